"""The chat page in a browser, against a real server: what a person sees and does."""

from __future__ import annotations

import json
import re
from io import BytesIO
from typing import Any

import jsonschema
from PIL import Image
from playwright.sync_api import Page, expect

SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["calm", "stormy"]}, "boats": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["mood", "boats"],
    "additionalProperties": False,
}
REFUSED = """{
  "type": "object",
  "properties": {
    "ports": {
      "type": "array",
      "items": {"type": "string"},
      "uniqueItems": true
    }
  }
}"""
JSON = ('{"a": [1, -0.5e3, true, null, "\\u00e9\\n"]}', " [] ", '"x"', '{"a":{},"b":[{}]}')
NOT_JSON = r"""[1,] | {"a":1,} | 01 | 1. | {'a': 1} | {"a" 1} | [1 2] | "\x" | nul | { | [" | [1]] | {"a": NaN}"""
JSON_AND_NOT = [*JSON, *NOT_JSON.split(" | "), "", "-", "[", '{"a":}', '"\t"']
NAMELESS_CONTROLS = """() => [...document.querySelectorAll('button, input, select, textarea')]
  .filter((one) => one.checkVisibility())
  .filter((one) => !(one.getAttribute('aria-label') || one.labels?.length || one.textContent.trim()))
  .map((one) => one.outerHTML)"""


def send(page: Page, text: str) -> None:
    page.fill("#prompt", text)
    page.keyboard.press("Enter")


def wait_for_answer(page: Page) -> None:
    expect(page.locator("#send")).to_have_text("Send", timeout=60_000)


def limit(page: Page, num_tokens: int) -> None:
    page.fill("#temperature", "0")
    page.fill("#max_tokens", str(num_tokens))


def test_an_answer_comes_piece_by_piece_with_its_tokens_and_speed(page: Page) -> None:
    limit(page, 24)
    send(page, "Write a short story about a harbour.")
    expect(page.locator("#send")).to_have_text("Stop")
    answer = page.locator("article.assistant")
    expect(answer).to_have_attribute("aria-busy", "true")
    lengths = set()
    while answer.get_attribute("aria-busy") == "true":
        lengths.add(len(answer.locator(".body").inner_text()))
    wait_for_answer(page)
    assert len(lengths) >= 3
    expect(answer.locator(".facts")).to_contain_text("24 tokens")
    expect(answer.locator(".facts")).to_contain_text("tok/s")
    expect(answer.locator(".facts")).to_contain_text("first after")
    expect(answer.locator(".facts")).to_contain_text("cut by the limit of tokens")


def test_escape_stops_an_answer_and_keeps_what_came(page: Page) -> None:
    limit(page, 1000)
    send(page, "Count from one to a thousand, in words.")
    expect(page.locator("article.assistant .body p:not(.waiting)").first).not_to_be_empty()
    page.keyboard.press("Escape")
    wait_for_answer(page)
    expect(page.locator("article.assistant .facts")).to_contain_text("stopped")
    assert page.locator("article.assistant .body").inner_text().strip()


def test_a_mistake_in_a_schema_is_shown_with_its_place_while_one_types(page: Page) -> None:
    page.fill("#schema", '{\n  "type": "object",,\n}')
    verdict = page.locator("#schema-verdict")
    expect(verdict).to_contain_text("Line 2, column 20")
    expect(verdict).to_contain_text("Not JSON: expected a name in double quotes")
    page.fill("#schema", REFUSED)
    expect(verdict).to_contain_text("Line 7, column 7")
    expect(verdict).to_contain_text("'uniqueItems' at #/properties/ports")
    expect(page.locator("#schema-mirror mark")).to_have_text('"uniqueItems": true')
    expect(page.locator("#schema-chip")).to_have_text(re.compile("Schema refused"))
    send(page, "Name some ports.")
    expect(page.locator("article")).to_have_count(0)
    expect(page.locator("#prompt")).to_have_value("Name some ports.")
    page.fill("#schema", json.dumps(SCHEMA))
    expect(verdict).to_contain_text("This schema will be kept.")


def test_an_answer_under_a_schema_keeps_it_and_says_so(page: Page) -> None:
    page.fill("#schema", json.dumps(SCHEMA))
    expect(page.locator("#schema-verdict.good")).to_be_visible()
    limit(page, 60)
    send(page, "How is the harbour today?")
    wait_for_answer(page)
    expect(page.locator("article.assistant .badge")).to_have_text("valid")
    shown = page.locator("article.assistant .json").inner_text()
    jsonschema.validate(json.loads(shown), SCHEMA)
    assert shown.splitlines()[1].startswith('  "mood": ')


def test_an_answer_under_a_schema_that_was_cut_says_so(page: Page) -> None:
    page.fill("#schema", json.dumps(SCHEMA))
    expect(page.locator("#schema-verdict.good")).to_be_visible()
    limit(page, 3)
    send(page, "How is the harbour today?")
    wait_for_answer(page)
    expect(page.locator("article.assistant .badge")).to_have_text("cut")
    expect(page.locator("article.assistant .note")).to_contain_text("does not keep the schema: cut off")


def test_messages_are_edited_answered_again_kept_over_a_reload_and_cleared(page: Page) -> None:
    limit(page, 4)
    send(page, "Hello")
    wait_for_answer(page)
    first = page.locator("article.assistant .body").inner_text()
    page.keyboard.press("ArrowUp")
    page.get_by_label("Edit the message").fill("Good evening")
    page.keyboard.press("Enter")
    wait_for_answer(page)
    expect(page.locator("article.user")).to_have_count(1)
    expect(page.locator("article.user .said")).to_have_text("Good evening")
    page.locator("article.assistant").get_by_role("button", name="Again").click()
    wait_for_answer(page)
    page.reload()
    expect(page.locator("article.user .said")).to_have_text("Good evening")
    assert page.locator("article.assistant .body").inner_text()
    assert first
    page.click("#clear")
    expect(page.locator("article")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()


def test_an_export_holds_the_conversation_and_no_key(page: Page) -> None:
    page.fill("#key", "a-secret-key")
    page.fill("#system", "Be brief.")
    limit(page, 4)
    send(page, "Hello")
    wait_for_answer(page)
    with page.expect_download() as download:
        page.click("#export")
    text = download.value.path().read_text()
    document = json.loads(text)
    assert [message["role"] for message in document["messages"]] == ["user", "assistant"]
    assert document["system"] == "Be brief."
    assert document["messages"][1]["usage"]["completion_tokens"] == 4
    assert "a-secret-key" not in text


def test_tokens_are_coloured_by_probability_and_show_what_else_was_likely(page: Page) -> None:
    page.check("#logprobs", force=True)
    limit(page, 8)
    send(page, "Hello")
    wait_for_answer(page)
    expect(page.locator(".token")).to_have_count(8)
    page.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".tip .taken")).to_contain_text("%")
    assert page.locator(".tip > div").count() >= 5


def test_a_refusal_of_the_server_is_shown_in_its_words_with_the_request(page: Page) -> None:
    page.fill("#max_tokens", "10000000")
    send(page, "Hello")
    wait_for_answer(page)
    problem = page.locator("article .problem")
    expect(problem).to_contain_text("max_tokens")
    expect(problem).to_contain_text(re.compile(r"request \S+"))
    expect(page.locator("#max_tokens")).to_have_attribute("aria-invalid", "true")
    page.fill("#max_tokens", "2")
    problem.get_by_role("button", name="Try again").click()
    wait_for_answer(page)
    expect(page.locator("article .problem")).to_have_count(0)


def test_a_server_that_is_gone_is_named(page: Page) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort())
    send(page, "Hello")
    expect(page.locator("article .problem")).to_contain_text("The server cannot be reached")


def test_what_is_sent_while_the_model_is_being_loaded_waits_for_it(page: Page) -> None:
    loading = {"error": {"message": "the model is being loaded"}}
    page.route("**/ready", lambda route: route.fulfill(status=503, json=loading))
    page.reload()
    expect(page.locator("#ready")).to_have_text("the model is being loaded")
    limit(page, 2)
    send(page, "Hello")
    expect(page.locator("article.assistant")).to_have_attribute("aria-busy", "true")
    page.unroute_all()
    wait_for_answer(page)
    expect(page.locator("article.assistant .facts")).to_contain_text("2 tokens")


def test_a_wrong_setting_is_shown_before_anything_is_sent(page: Page) -> None:
    page.fill("#temperature", "7")
    send(page, "Hello")
    expect(page.locator("#sampling-problem")).to_have_text("Temperature: from 0 to 2")
    expect(page.locator("#temperature")).to_be_focused()
    expect(page.locator("article")).to_have_count(0)


def test_nothing_that_is_said_becomes_markup(page: Page) -> None:
    hostile = '<img src=x onerror="document.title=1"> <b>bold</b> **<i>strong</i>**\n```html\n<script>1</script>\n```'
    limit(page, 2)
    send(page, hostile)
    wait_for_answer(page)
    tags = page.evaluate(
        """async (text) => {
            const { markdown } = await import('/page/markdown.js');
            const box = document.createElement('div');
            box.append(...markdown(text));
            return [...box.querySelectorAll('*')].map((one) => one.localName);
        }""",
        hostile,
    )
    assert page.locator("article img, article b, article script").count() == 0
    assert set(tags) == {"p", "strong", "figure", "figcaption", "span", "button", "pre", "code"}


def test_the_page_may_run_its_own_scripts_only(page: Page, address: str) -> None:
    answer = page.request.get(address)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_reader_of_schemas_takes_what_json_is_and_nothing_else(page: Page) -> None:
    read = page.evaluate(
        """async (texts) => {
            const { parseWithPlaces } = await import('/page/json.js');
            const read = (text) => {
                try { return { value: parseWithPlaces(text).value }; }
                catch (error) { return { offset: error.offset }; }
            };
            return texts.map(read);
        }""",
        JSON_AND_NOT,
    )
    assert [one.get("value", "refused") for one in read] == [_value(text) for text in JSON_AND_NOT]
    assert all(0 <= one.get("offset", 0) <= len(text) for one, text in zip(read, JSON_AND_NOT, strict=True))


def _value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=lambda name: json.loads("!"))
    except ValueError:
        return "refused"


def test_dark_is_dark_by_the_system_and_by_choice(page: Page) -> None:
    assert lightness(page) > 0.85
    page.emulate_media(color_scheme="dark")
    assert lightness(page) < 0.25
    page.select_option("#theme", "light")
    assert lightness(page) > 0.85


def lightness(page: Page) -> float:
    """Return the mean lightness of what is on the screen, 0 to 1."""
    picture = Image.open(BytesIO(page.screenshot())).convert("L").resize((1, 1), Image.Resampling.BOX)
    return float(picture.getpixel((0, 0))) / 255  # type: ignore[arg-type]


def test_a_narrow_window_holds_everything_and_puts_the_settings_away(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.reload()
    expect(page.locator("#panel")).to_be_hidden()
    page.click("#open-panel")
    expect(page.locator("#schema")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#panel")).to_be_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_every_control_has_a_name(page: Page) -> None:
    assert page.evaluate(NAMELESS_CONTROLS) == []

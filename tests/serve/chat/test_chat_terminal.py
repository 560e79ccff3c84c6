"""`ferry chat` as its user meets it: once in a pipe, and as a conversation at a terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from foreign_server import ForeignServer, foreign_server
from terminal import ferry_at_terminal

import ferry
from ferry.core.errors import ConfigError, InputError, UnavailableError

SCHEMA = {"type": "object", "properties": {"sail": {"type": "integer"}}, "required": ["sail"]}


@pytest.fixture
def server() -> Iterator[ForeignServer]:
    with foreign_server() as running:
        yield running


@pytest.fixture
def schema_file(tmp_path: Path) -> Path:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return path


def chat(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ferry", "chat", *words]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


def test_what_is_piped_in_is_answered_and_nothing_else_is_on_stdout(server: ForeignServer) -> None:
    done = chat(server.address, "--system", "You are a sailor.", stdin="Greet me.\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Good day.\n", "")
    messages = [("system", "You are a sailor."), ("user", "Greet me.")]
    assert server.requests[0]["messages"] == [{"role": role, "content": text} for role, text in messages]
    assert server.requests[0]["model"] == "barque"


def test_json_gives_one_document_with_answer_usage_and_verdict(server: ForeignServer, schema_file: Path) -> None:
    server.pieces = ('{"sail"', ":3", "}")
    done = chat(f"{server.address}/v1", "--prompt", "Sails?", "--schema", str(schema_file), "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 0
    assert document["answer"] == '{"sail":3}'
    assert document["usage"]["completion_tokens"] == 3
    assert document["guided"] == {"valid": True, "reason": "", "pointer": ""}
    assert server.requests[0]["response_format"]["json_schema"]["schema"] == SCHEMA


def test_an_answer_that_breaks_its_schema_is_told_by_exit_status_8(server: ForeignServer, schema_file: Path) -> None:
    server.pieces = ('{"sail"', ':"three"', "}")
    done = chat(server.address, "--prompt", "Sails?", "--schema", str(schema_file))
    assert done.returncode == 8
    assert done.stdout == '{"sail":"three"}\n'
    assert "NOT valid: 'three' is not of type 'integer'" in done.stderr


def test_an_answer_that_was_cut_breaks_its_schema_too(server: ForeignServer, schema_file: Path) -> None:
    server.pieces, server.finish = ('{"sail"',), "length"
    done = chat(server.address, "--prompt", "Sails?", "--schema", str(schema_file), "--json")
    assert done.returncode == 8
    assert json.loads(done.stdout)["guided"]["reason"].startswith("cut off by the limit of tokens: not JSON")


def test_an_answer_has_a_bound_where_none_is_set_and_a_cut_is_said(server: ForeignServer) -> None:
    server.finish = "length"
    done = chat(server.address, "--prompt", "Tell a tale")
    assert (done.returncode, done.stdout) == (0, "Good day.\n")
    assert "cut by the limit of tokens (a higher max_tokens allows more)" in done.stderr
    ferry.chat(target=server.address, prompt="Hello", max_tokens=4000)
    assert [body["max_tokens"] for body in server.requests] == [1024, 4000]


def test_a_context_with_less_room_than_the_usual_bound_is_the_bound(server: ForeignServer) -> None:
    server.room = 300
    assert ferry.chat(target=server.address, prompt="Hello")["answer"] == "Good day."
    assert [body.get("max_tokens") for body in server.requests] == [1024, None]
    with pytest.raises(ConfigError, match="more than 300"):
        ferry.chat(target=server.address, prompt="Hello", max_tokens=301)


def test_from_python_it_returns_the_answer(server: ForeignServer) -> None:
    result = ferry.chat(target=server.address, prompt="Hello", temperature=0.0, seed=7, model="brig")
    assert result["answer"] == "Good day."
    assert server.requests[0]["temperature"] == 0
    assert (server.requests[0]["seed"], server.requests[0]["model"]) == (7, "brig")
    assert "top_p" not in server.requests[0]


def test_the_first_line_of_the_key_file_is_the_key(server: ForeignServer, tmp_path: Path) -> None:
    server.key = "sesame"
    keys = tmp_path / "keys"
    keys.write_text("sesame\nother\n")
    assert ferry.chat(target=server.address, prompt="Hello", api_key_file=keys)["answer"] == "Good day."
    with pytest.raises(ConfigError, match=r"wrong key \(request request-7\)") as caught:
        ferry.chat(target=server.address, prompt="Hello")
    assert caught.value.code == "chat.key"


def test_what_the_server_refuses_is_said_in_its_words(server: ForeignServer) -> None:
    server.refusal = (400, "temperature is too warm")
    with pytest.raises(ConfigError, match="temperature is too warm"):
        ferry.chat(target=server.address, prompt="Hello")
    server.refusal = (429, "the harbour is full")
    with pytest.raises(UnavailableError, match="the harbour is full"):
        ferry.chat(target=server.address, prompt="Hello")


def test_an_answer_without_its_end_is_an_error(server: ForeignServer) -> None:
    server.finish = None
    with pytest.raises(UnavailableError, match="has no end"):
        ferry.chat(target=server.address, prompt="Hello")


def test_mistakes_before_any_request_have_names(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1 cannot be reached"):
        ferry.chat(target="127.0.0.1:1", prompt="Hello")
    with pytest.raises(InputError, match="neither a directory nor an address"):
        ferry.chat(target="no/such/model", prompt="Hello")
    (tmp_path / "schema.json").write_text("a schema")
    with pytest.raises(InputError, match="is not JSON: Expecting value: line 1 column 1"):
        ferry.chat(target="127.0.0.1:1", prompt="Hello", schema_file=tmp_path / "schema.json")
    with pytest.raises(ConfigError, match="No closing quotation"):
        ferry.chat(target="127.0.0.1:1", prompt="Hello", serve_args="--dtype 'float")


def test_a_conversation_remembers_stops_retries_and_saves(server: ForeignServer, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    with ferry_at_terminal("chat", server.address) as terminal:
        terminal.see("barque at")
        terminal.see("> ")
        terminal.type("Hello\n")
        assert "Good day." in terminal.see("3 tokens")
        terminal.see("> ")
        terminal.type("/tokens\n")
        terminal.see("12 tokens of 512; answers together 3")
        terminal.type("/set temperature 0.2\n")
        terminal.see("temperature 0.2\n")
        server.pieces, server.is_endless = ("Once ", "upon"), True
        terminal.type("Tell\\\n")
        terminal.see("  ")
        terminal.type("a tale\n")
        terminal.see("Once upon")
        terminal.type("\x03")
        terminal.see("stopped")
        assert server.was_left.wait(20)
        server.pieces, server.is_endless = ("No.",), False
        terminal.see("> ")
        terminal.type("/retry\n")
        terminal.see("No.\n")
        terminal.see("> ")
        terminal.type(f"/save {saved}\n")
        terminal.see("saved 4 messages")
        terminal.see("> ")
        terminal.type("\x04")
        terminal.see("2 answers by barque")
        assert terminal.end() == 0
    assert [body["messages"][-1]["content"] for body in server.requests] == ["Hello", *["Tell\na tale"] * 2]
    assert [len(body["messages"]) for body in server.requests] == [1, 3, 3]
    assert server.requests[-1]["temperature"] == 0.2
    assert [message["content"] for message in json.loads(saved.read_text())["messages"]][1::2] == ["Good day.", "No."]


def test_mistakes_in_a_conversation_do_not_end_it(server: ForeignServer) -> None:
    with ferry_at_terminal("chat", server.address) as terminal:
        for typed, shown in (
            ("/sett temperature 1", "no command /sett (did you mean 'set'?)"),
            ("/set temperature 9", "less than or equal to 2"),
            ("/schema nowhere.json", "nowhere.json cannot be read"),
            ("/retry", "nothing was said yet"),
            ("/help", "/tokens"),
        ):
            terminal.see("> ")
            terminal.type(f"{typed}\n")
            terminal.see(shown)
        server.refusal = (503, "not today")
        terminal.see("> ")
        terminal.type("Hello\n")
        terminal.see("not today [chat.unavailable]")
        terminal.see("> ")
        terminal.interrupt("Ctrl-D leaves")
        terminal.see("> ")
        terminal.type("\x04")
        assert terminal.end() == 0


def test_a_model_cannot_write_to_the_terminal_but_text(server: ForeignServer) -> None:
    server.pieces = ("\x1b]0;sunk\x07", "\x1b[2J", "af\x00loat\n", "\tdry \x9b31m")
    with ferry_at_terminal("chat", server.address, "--prompt", "Hello") as terminal:
        assert terminal.end() == 0
    raw = terminal.text
    assert "]0;sunk[2Jafloat\n" in raw
    assert not any(character in raw for character in "\x07\x00\x9b")


@pytest.mark.slow
def test_a_model_directory_is_served_for_the_conversation_and_no_longer(smollm2: Path) -> None:
    with ferry_at_terminal("chat", str(smollm2), "--max-tokens", "8", "--temperature", "0") as terminal:
        terminal.see("starting ferry serve")
        address = terminal.see(". /help").split(" at ")[-1].removesuffix(". /help")
        terminal.see("> ")
        terminal.type("Hello\n")
        terminal.see("tokens")
        terminal.see("> ")
        terminal.type("\x04")
        assert terminal.end() == 0
    with pytest.raises(UnavailableError, match="cannot be reached"):
        ferry.chat(target=address, prompt="Hello")


def test_a_directory_without_a_model_fails_with_the_reason_of_the_server(tmp_path: Path) -> None:
    done = chat(str(tmp_path), "--prompt", "Hello", "--json")
    error = json.loads(done.stdout)["error"]
    assert done.returncode == error["exit_status"] != 0
    assert os.fspath(tmp_path) in error["message"]

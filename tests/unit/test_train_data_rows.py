"""Training data from files to conversations: every format is read, and every row that cannot be used has a reason."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from ferry.core.errors import ConfigError, InputError
from ferry.data.conversation import BadRow, Conversation, Text
from ferry.data.handlers import ALIASES, choose_handler, convert, named_handler
from ferry.data.readers import Source, fingerprint, parse, read_rows, sources_of
from ferry.data.settings import parse_item

MOSS = {
    "conversation_id": 1,
    "meta_instruction": "You are MOSS.",
    "num_turns": 2,
    "chat": {
        "turn_2": {
            "Human": "<|Human|>: And 2+2?<eoh>\n",
            "Inner Thoughts": "<|Inner Thoughts|>: calculate<eot>\n",
            "Commands": '<|Commands|>: Calculate("2+2")<eoc>\n',
            "Tool Responses": "<|Results|>: 4<eor>\n",
            "MOSS": "<|MOSS|>: It is 4.<eom>\n",
        },
        "turn_1": {
            "Human": "<|Human|>: Hello: you<eoh>\n",
            "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
            "Commands": "<|Commands|>: None<eoc>\n",
            "Tool Responses": "<|Results|>: None<eor>\n",
            "MOSS": "<|MOSS|>: Hi there.<eom>\n",
        },
    },
}
FUNCTION = {"name": "add", "parameters": {"type": "object", "properties": {}}}
ROWS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "alpaca": (
        {"instruction": "Add.", "input": "1+1", "output": "2", "system": "Be brief.", "history": [["Hi", "Yes?"]]},
        [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Add.\n1+1"), ("assistant", "2")],
    ),
    "sharegpt": (
        {
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}],
        },
        [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?")],
    ),
    "messages": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                {"role": "assistant", "content": "Yes?"},
            ]
        },
        [("user", "Hi"), ("assistant", "Yes?")],
    ),
    "moss": (
        MOSS,
        [
            ("system", "You are MOSS."),
            ("user", "Hello: you"),
            ("assistant", "Hi there."),
            ("user", "And 2+2?"),
            ("assistant", 'Calculate("2+2")'),
            ("tool", "4"),
            ("assistant", "It is 4."),
        ],
    ),
    "belle": (
        {"instruction": "Human: Hi\nAssistant: Yes?\nHuman: 1+1\nAssistant:\n", "input": "", "output": "2"},
        [("user", "Hi"), ("assistant", "Yes?"), ("user", "1+1"), ("assistant", "2")],
    ),
    "prompt-completion": ({"prompt": "Hi", "completion": "Yes?"}, [("user", "Hi"), ("assistant", "Yes?")]),
}
MOSS_002 = {"plain_text": "[Human]: Hi<eoh> [MOSS]: Yes?<eoa> [Human]: 1+1<eoh> [MOSS]: 2<eoa>", "num_turns": 2}


def rows_of(path: Path) -> list[Any]:
    (source,) = sources_of(path)[0]
    return [parse(row.payload) for row in read_rows(source)]


def read(name: str, row: object) -> list[tuple[str, object]]:
    meaning = convert(named_handler(name), row)
    assert isinstance(meaning, Conversation)
    return [(message.role, message.content) for message in meaning.messages]


@pytest.mark.parametrize("name", ROWS)
def test_each_format_is_recognised_by_its_rows_and_read(name: str) -> None:
    row, expected = ROWS[name]
    handler = choose_handler("", [row], "data")
    assert handler.format.name == name
    assert "1 of the first 1 rows" in handler.reason
    assert read(name, row) == expected


def test_the_older_moss_rows_are_read() -> None:
    assert choose_handler("", [MOSS_002], "data").format.name == "moss"
    assert read("moss", MOSS_002) == [("user", "Hi"), ("assistant", "Yes?"), ("user", "1+1"), ("assistant", "2")]


@pytest.mark.parametrize("key", ["text", "content"])
def test_texts_are_recognised(key: str) -> None:
    assert convert(choose_handler("", [{key: "Once."}], "data"), {key: "Once."}) == Text("Once.")


def test_a_sharegpt_function_call_becomes_a_tool_call_with_parsed_arguments() -> None:
    row = {
        "tools": json.dumps([FUNCTION]),
        "conversations": [
            {"from": "human", "value": "1+1"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "2."},
        ],
    }
    meaning = convert(named_handler("sharegpt"), row)
    assert isinstance(meaning, Conversation)
    assert meaning.tools == ({"type": "function", "function": FUNCTION},)
    assert [message.role for message in meaning.messages] == ["user", "assistant", "tool", "assistant"]
    assert meaning.messages[1].tool_calls[0]["function"] == {"name": "add", "arguments": {"a": 1}}


def test_openai_arguments_written_as_text_are_parsed_and_weight_0_is_not_learned() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {
        "messages": [
            {"role": "user", "content": "1+1"},
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
            {"role": "assistant", "content": "2."},
        ]
    }
    meaning = convert(named_handler("messages"), row)
    assert isinstance(meaning, Conversation)
    assert meaning.messages[1].tool_calls[0] == {**call, "function": {"name": "add", "arguments": {"a": 1}}}
    assert [message.is_target for message in meaning.messages] == [True, False, True, True]
    assert meaning.messages[2].further == {"tool_call_id": "c1"}


def test_pictures_are_kept_as_paths() -> None:
    row = {
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A cat."},
        ],
    }
    meaning = convert(named_handler("messages"), row)
    assert isinstance(meaning, Conversation)
    assert meaning.images == ("a.png", "b.png")


def test_every_handler_name_of_the_manual_is_an_alias() -> None:
    manual = "GeneralPretrainHandler GeneralInstructionHandler MOSSMultiTurnHandler AlpacaStyleInstructionHandler "
    manual += "SharegptStyleInstructionHandler OpenAIInstructionHandler AlpacaPretrainHandler SharegptPretrainHandler "
    manual += "BelleMultiTurnInstructionHandler"
    assert set(manual.split()) <= set(ALIASES)
    for name, (format_name, learn_all) in ALIASES.items():
        handler = named_handler(name)
        assert (handler.format.name, handler.learn_all) == (format_name, learn_all)
        assert learn_all == ("Pretrain" in name)


def test_an_unknown_handler_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'MOSSMultiTurnHandler'\?") as caught:
        named_handler("MOSSMultiturnHandler")
    assert caught.value.code == "data.handler"


def test_rows_of_no_known_format_are_refused_by_their_keys() -> None:
    with pytest.raises(InputError, match="the keys question, std_answer") as caught:
        choose_handler("", [{"question": "1+1", "std_answer": "2"}], "data.json")
    assert caught.value.code == "data.format"


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {}, "rejected": {}},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No!"}], "label": False},
    ],
)
def test_bad_answers_of_preference_data_are_never_learned_as_answers(row: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        choose_handler("", [row], "data.json")
    assert caught.value.code == "data.preference"


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("alpaca", {"instruction": "Add."}, "no 'output'"),
        ("alpaca", {"instruction": "Add.", "output": 2}, "'output' is a number, expected text"),
        ("alpaca", {"instruction": "", "output": "2"}, "'instruction' is empty"),
        ("alpaca", {"instruction": "Add.", "output": ""}, "turn 2, an answer, is empty"),
        ("alpaca", {"instruction": "Add.", "output": "2", "history": ["x"]}, "'history' is not a list"),
        ("alpaca", ["Add.", "2"], "the row is a list, expected a mapping"),
        ("sharegpt", {"conversations": []}, "the conversation is empty"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}]}, "no answer"),
        ("sharegpt", {"conversations": [{"from": "cat", "value": "Hi"}]}, "unknown speaker 'cat'"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "add("}]}, "a function call is not JSON"),
        ("messages", {"messages": [{"role": "user", "content": 3}]}, "'content' is a number"),
        ("messages", {"messages": [{"role": "robot", "content": "Hi"}]}, "unknown role 'robot'"),
        ("messages", {"text": "Hi"}, "the turns are nothing, expected a list"),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "?"}]},
            "the last turn is 'user', expected an answer",
        ),
        ("moss", {"num_turns": 3, "chat": MOSS["chat"]}, "'num_turns' is 3, 'chat' holds 2"),
        ("moss", {"chat": {"turn_1": {"Human": "Hi"}}}, "'turn_1' has no text"),
        ("belle", {"instruction": "Human: Hi\nAssistant: Yes?", "output": "x"}, "does not end with a turn"),
        ("text", {"text": " \n"}, "the text is empty"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(name: str, row: object, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        convert(named_handler(name), row)


def test_lines_are_read_with_their_numbers_and_blank_ones_are_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 2}')
    rows = list(read_rows(sources_of(path)[0][0]))
    assert [(row.place, parse(row.payload)) for row in rows] == [(":1", {"a": 1}), (":4", {"a": 2})]
    assert fingerprint(sources_of(path)[0][0]).num_rows == 4


@pytest.mark.parametrize(("line", "reason"), [(b'{"a": 1', "not JSON"), (b'{"a": "\xff"}', "not UTF-8 at byte 7")])
def test_a_broken_line_says_why(line: bytes, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        parse(line)


def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"text": f"row {number} é", "tags": [number]} for number in range(1500)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "c.jsonl").write_bytes(lines)
    (tmp_path / "d.json").write_bytes(lines)
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(lines))
    for path in sorted(tmp_path.iterdir()):
        source = sources_of(path)[0][0]
        assert rows_of(path) == rows, path.name
        assert sum(row.num_bytes for row in read_rows(source)) <= source.num_bytes


def test_parquet_rows_are_those_that_were_written(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?", "weight": 1}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert rows_of(tmp_path / "rows.parquet") == rows
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match="cannot be read"):
        rows_of(tmp_path / "bad.parquet")


def test_zstandard_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "a"}\n{"text": "b"}\n'))
    assert rows_of(tmp_path / "rows.jsonl.zst") == [{"text": "a"}, {"text": "b"}]


def test_a_text_file_is_one_document_unless_it_marks_their_ends(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a\n\nb\n")
    (tmp_path / "more.txt").write_text("a\nb<|endoftext|>c\n<|endoftext|>\nd\n")
    assert rows_of(tmp_path / "one.txt") == [Text("a\n\nb\n")]
    assert rows_of(tmp_path / "more.txt") == [Text("a\nb"), Text("c\n"), Text("\nd\n")]
    assert [row.place for row in read_rows(sources_of(tmp_path / "more.txt")[0][0])] == [":1", ":2", ":3"]


def test_a_very_long_document_is_cut_at_a_line_end_and_only_its_last_piece_is_complete(tmp_path: Path) -> None:
    line = "x" * 1023 + "\n"
    (tmp_path / "long.txt").write_text(line * 1500)
    pieces = rows_of(tmp_path / "long.txt")
    assert "".join(piece.content for piece in pieces) == line * 1500
    assert [(len(piece.content), piece.is_complete) for piece in pieces] == [(1024 * 1024, False), (476 * 1024, True)]


def test_a_directory_gives_its_data_files_in_order_and_names_the_others(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/c.jsonl", "README.md", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
    sources, skipped = sources_of(tmp_path)
    assert [source.name for source in sources] == ["a/c.jsonl", "b.jsonl"]
    assert skipped == ["README.md"]


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("x.json", b'[{"a": 1},', "data.unreadable"),
        ("x.json", b'{"a": 1}', "data.unreadable"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-20], "data.compressed"),
        ("x.txt", b"a\xff\xfe", "data.unreadable"),
        ("x.csv", b"a,b", "data.file"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_with_its_name(
    tmp_path: Path, name: str, content: bytes, code: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name) as caught:
        rows_of(tmp_path / name)
    assert caught.value.code == code


def test_an_item_is_a_path_with_an_optional_weight(tmp_path: Path) -> None:
    (tmp_path / "a.json").touch()
    (tmp_path / "b:2").touch()
    assert parse_item(f"{tmp_path}/a.json") == (tmp_path / "a.json", None)
    assert parse_item(f"{tmp_path}/a.json:0.5") == (tmp_path / "a.json", 0.5)
    assert parse_item(f"{tmp_path}/b:2") == (tmp_path / "b:2", None)
    assert parse_item(f"{tmp_path}/b:2:3") == (tmp_path / "b:2", 3.0)
    for text in (f"{tmp_path}/a.json:0", f"{tmp_path}/a.json:-1", f"{tmp_path}/a.json:nan", f"{tmp_path}/a.json:x"):
        with pytest.raises(ConfigError) as caught:
            parse_item(text)
        assert caught.value.code == "data.weight"
    with pytest.raises(InputError, match=r"c\.json is not there"):
        parse_item(f"{tmp_path}/c.json:2")


def test_a_source_knows_its_size(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}\n")
    assert sources_of(tmp_path / "a.jsonl")[0] == [Source(tmp_path / "a.jsonl", "a.jsonl", ".jsonl", 3)]

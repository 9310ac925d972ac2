"""Unusable rows and files exit with 3 and name file, row and key, the value found and a fix, without a traceback."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from cli.main import app
from tests.fixtures.recipes import write_recipe

USER, ASSISTANT = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}
CHAT = {"messages": [USER, ASSISTANT]}
TOKENS = {"input_ids": [1, 2], "labels": [-100, 2]}
GOOD: dict[str, dict[str, Any]] = {
    "chat": CHAT,
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "instruction": {"instruction": "Translate", "output": "Hello"},
    "completion": {"prompt": "2+2=", "completion": "4"},
    "qa": {"context": "c", "question": "Who?", "answers": ["Ann"]},
    "multiple_choice": {"question": "Which?", "choices": ["red", "blue"], "answer": 1},
    "classification": {"text": "Great", "label": "positive"},
    "text": {"text": "Once upon a time"},
    "tokenized": TOKENS,
}


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def raw(old: str, new: bytes) -> bytes:
    """A good line with some of its bytes changed."""
    return json.dumps(CHAT).encode().replace(old.encode(), new)


LINES: dict[str, tuple[str, Any, str]] = {
    "no JSON": ("chat", b"{broken", ":2: not valid JSON"),
    "a number": ("chat", b"42", ":1: expected a JSON object, found a number (42)"),
    "a list": ("chat", b"[1]", ":1: expected a JSON object, found a list"),
    "null": ("chat", b"null", ":1: expected a JSON object, found null"),
    "two objects": ("chat", b"{} {}", ":4: not valid JSON: Extra data"),
    "a line cut off": ("chat", raw("}]}", b""), "not valid JSON"),
    "a key twice": ("chat", b'{"messages": [], "messages": []}', "key 'messages' occurs twice"),
    "an inner key twice": ("chat", raw('"content": "Hi"', b'"content": "a", "content": "b"'), "'content' occurs twice"),
    "NaN": ("chat", b'{"messages": NaN}', "NaN is not JSON"),
    "infinity": ("chat", b'{"messages": -Infinity}', "-Infinity is not JSON"),
    "an endless number": ("chat", b'{"messages": ' + b"9" * 5000 + b"}", "Exceeds the limit (4300 digits)"),
    "half a surrogate": ("chat", raw("Hello", rb"\ud800"), "half of an escaped character"),
    "half a surrogate in a key": ("chat", rb'{"\udc00": 1}', "half of an escaped character"),
    "a null byte": ("chat", raw("Hello", b"a\0b"), ":45: not valid JSON: Invalid control character"),
    "no UTF-8": ("chat", raw("Hello", b"\xff"), ":44: byte 0xff is not UTF-8"),
    "UTF-8 longer than it needs": ("chat", raw("Hello", b"\xc0\x80"), ":44: byte 0xc0 is not UTF-8"),
    "UTF-16": ("chat", json.dumps(CHAT).encode("utf-16"), ":1: byte 0xff is not UTF-8"),
    "deep nesting": ("chat", b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "a line of 17 MiB": ("chat", chat({**USER, "content": "x" * (17 << 20)}, ASSISTANT), ": the line is longer"),
    "no column": ("chat", {"text": "x"}, ": column 'messages' must be a list of messages, found no such column"),
    "nothing": ("chat", {}, "found no such column among: none"),
    "no messages": ("chat", {"messages": []}, ": column 'messages' must be a list of messages, found a list ([])"),
    "messages as text": ("chat", {"messages": "x"}, 'found text ("x")'),
    "messages null": ("chat", {"messages": None}, "must be a list of messages, found null"),
    "a message as text": ("chat", chat("x"), 'messages[0] must be an object with role and content, found text ("x")'),
    "no role": ("chat", chat({"content": "x"}), "messages[0].role must be one of"),
    "an unknown role": ("chat", chat({**USER, "role": "robot"}), 'found text ("robot")'),
    "content a number": ("chat", chat({**USER, "content": 1}), "messages[0].content must be text, found a number (1)"),
    "content null": (
        "chat",
        chat({**USER, "content": None}, ASSISTANT),
        "messages[0].content must be text, found null",
    ),
    "answer null": ("chat", chat(USER, {**ASSISTANT, "content": None}), "the answer of turn 1 is empty"),
    "content a boolean": ("chat", chat({**USER, "content": True}), "found a boolean (true)"),
    "content an object": ("chat", chat({**USER, "content": {"a": "x" * 500}}), "messages[0].content must be text"),
    "train as text": ("chat", chat(USER, {**ASSISTANT, "train": "yes"}), "messages[1].train must be true or false"),
    "tools that are no JSON": ("chat", chat(USER, ASSISTANT, tools="{"), "column 'tools' must be JSON"),
    "tools a number": ("chat", chat(USER, ASSISTANT, tools=5), "column 'tools' must name a function"),
    "a call of nothing": (
        "chat",
        chat(USER, {**ASSISTANT, "tool_calls": [{"function": {}}]}),
        "messages[1].tool_calls",
    ),
    "no answer": ("chat", chat(USER), "the row has no target tokens"),
    "no question": ("chat", chat(ASSISTANT), "the first message has the role assistant"),
    "too many words": ("chat", chat({**USER, "content": "x" * 500}, ASSISTANT), "more than data.max_length: 128"),
    "an unknown speaker": ("sharegpt", {"conversations": [{"from": "x", "value": "y"}]}, "conversations[0].from"),
    "an instruction that is a number": (
        "instruction",
        {"instruction": 1, "output": "x"},
        "column 'instruction' must be",
    ),
    "no completion": ("completion", {"prompt": "x"}, "the row has no column 'completion'"),
    "text as a list": ("text", {"text": ["x"]}, "column 'text' must be text, found a list"),
    "answers a number": ("qa", {**GOOD["qa"], "answers": 3}, "'answers'"),
    "an answer that is no choice": ("multiple_choice", {**GOOD["multiple_choice"], "answer": 7}, "'answer'"),
    "a label that is an object": ("classification", {"text": "x", "label": {}}, "'label'"),
    "a negative token": ("tokenized", {**TOKENS, "input_ids": [-1, 2]}, "'input_ids'"),
    "a broken token": ("tokenized", {**TOKENS, "input_ids": [1.5, 2]}, "'input_ids'"),
    "a boolean token": ("tokenized", {**TOKENS, "input_ids": [True, 2]}, "'input_ids'"),
    "a huge token": (
        "tokenized",
        {**TOKENS, "input_ids": [1, 10**30], "labels": [-100, 10**30]},
        "is outside of the model's vocabulary",
    ),
    "a label less": ("tokenized", {**TOKENS, "labels": [2]}, "labels"),
}
"""The format, the fourth row of a JSONL file as bytes or a value, and what is said after `file:4`."""


def table(*rows: Any) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(list(rows)), sink)
    return bytes(sink.getvalue())


MANY = (json.dumps(CHAT).encode() + b"\n") * 500
TABLE = table(*[CHAT] * 500)
ZIPPED = gzip.compress(MANY)
ROW = json.dumps(CHAT).encode()

FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("rows.jsonl", b"", ": there are no rows"),
    "blank lines": ("rows.jsonl", b"\n \n", ": there are no rows"),
    "old Mac line ends": ("rows.jsonl", MANY.replace(b"\n", b"\r"), ":1:94: not valid JSON"),
    "cut off": ("rows.jsonl", MANY[:-20], ":500:74: not valid JSON"),
    "gz cut off": ("rows.jsonl.gz", ZIPPED[:-30], ": the file cannot be decompressed"),
    "gz that is none": ("rows.jsonl.gz", b"PK", ": the file cannot be decompressed"),
    "gz with another sum": ("rows.jsonl.gz", ZIPPED[:-8] + bytes(8), ": the file cannot be decompressed"),
    "gz of one long line": ("rows.jsonl.gz", gzip.compress(bytes(20 << 20)), ":1: the line is longer than 16 MiB"),
    "Parquet cut off": ("rows.parquet", TABLE[:-100], ": the Parquet file is damaged"),
    "Parquet that is none": ("rows.parquet", b"PAR1" + bytes(100) + b"PAR1", ": the Parquet file is damaged"),
    "Parquet with 200 bytes changed": ("rows.parquet", TABLE[:300] + b"\xff" * 200 + TABLE[500:], ": the Parquet"),
    "Parquet with a null": ("rows.parquet", table(CHAT, CHAT, CHAT, {"messages": None}), ":row 4: column 'messages'"),
    "Parquet of another type": ("rows.parquet", table({"messages": "x"}), ":row 1: column 'messages'"),
    "JSON with a comma too many": ("rows.json", b"[" + ROW + b",]", ":1:95: not valid JSON"),
    "JSON of a number": ("rows.json", b"7", ":1:1: not valid JSON: expected [ or {, found 7"),
    "JSON cut off": ("rows.json", b"[" + ROW[:-9], ":1:85: not valid JSON"),
    "JSON with a number among rows": ("rows.json", b"[" + ROW + b", 5]", ":1:96: expected a JSON object"),
    "CSV with a cell too many": ("rows.csv", b"prompt,completion\na,b\nc,d,e\n", ":3: expected 2 cells"),
    "CSV with a cell less": ("rows.csv", b"prompt,completion\na,b\nc\n", ":3: expected 2 cells"),
    "CSV with an open quote": (
        "rows.csv",
        b'prompt,completion\na,b\n"c,d\n',
        ":3, column 'prompt': the quote is not closed",
    ),
    "CSV with a column twice": ("rows.csv", b"prompt,prompt\na,b\n", ":1: the header names column 'prompt' twice"),
    "CSV that is no UTF-8": ("rows.csv", b"prompt,completion\n\xff,b\n", ":2:1: byte 0xff is not UTF-8"),
    "text that is no UTF-8": ("rows.txt", b"one\n\xff\n", ":2:1: byte 0xff is not UTF-8"),
    "a pickle": ("rows.pkl", b"\x80\x04N.", ": expected a file of one of the kinds"),
}
"""The file's name, its bytes, and what is said after the name."""


class Outcome(NamedTuple):
    """Result of `ft train` on a file."""

    code: int
    said: str


def train(file: Path, sections: dict[str, Any], row_format: str, *overrides: str) -> Outcome:
    """Train on a file with any content."""
    sections["data"] = {"train": [{"path": str(file), "format": row_format}], "max_length": 128}
    options = [part for override in overrides for part in ("--set", override)]
    recipe = write_recipe(sections, file.parent)
    result = CliRunner().invoke(app, ["train", str(recipe), "--quiet", "--run-dir", str(file.parent / "run"), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Outcome(result.exit_code, result.stderr)


def is_refused(outcome: Outcome, start: str, words: str, folder: Path) -> None:
    (error,) = [line for line in outcome.said.splitlines() if line.startswith("error: ")]
    assert outcome.code == 3
    assert error.startswith(f"error: {start}"), error
    assert words in error
    assert len(error) < len(start) + 300  # of a row's content no more than a glimpse
    assert "\n  -> " in outcome.said
    assert not (folder / "run").exists()


@pytest.mark.parametrize("name", LINES)
def test_bad_row_is_refused_with_line_and_key(name: str, tiny_recipe: dict[str, Any], tmp_path: Path):
    row_format, bad, words = LINES[name]
    good = json.dumps(GOOD[row_format]).encode()
    line = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([good, good, good, line, good, b""]))
    is_refused(train(file, tiny_recipe, row_format), f"{file}:4", words, tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_bad_file_is_refused_with_name_and_position(name: str, tiny_recipe: dict[str, Any], tmp_path: Path):
    file_name, content, words = FILES[name]
    file = tmp_path / file_name
    file.write_bytes(content)
    row_format = {".csv": "completion", ".txt": "text"}.get(file.suffix, "chat")
    is_refused(train(file, tiny_recipe, row_format), f"{file}{words}", "", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no JSON", "content null", "no UTF-8"])
def test_bad_row_at_line_100000_is_found(name: str, tiny_recipe: dict[str, Any], tmp_path: Path):
    row_format, bad, words = LINES[name]
    file = tmp_path / "rows.jsonl"
    line = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    file.write_bytes(ROW.join([b"", *[b"\n"] * 99_999]) + line + b"\n")
    is_refused(train(file, tiny_recipe, row_format), f"{file}:100000", words, tmp_path)


GOOD_FILES = {
    "a byte order mark": b"\xef\xbb\xbf" + MANY,
    "line ends of Windows": MANY.replace(b"\n", b"\r\n"),
    "no end of the last line": MANY[:-1],
    "blank lines between": MANY.replace(b"\n", b"\n\n \n"),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_file_with_editor_artifacts_has_the_same_rows(name: str, tiny_recipe: dict[str, Any], tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(GOOD_FILES[name])
    assert train(file, tiny_recipe, "chat", "training.max_steps=1").code == 0
    counts = json.loads((tmp_path / "run" / "data_report.json").read_text())["train"]
    assert (counts["read"], counts["used"]) == (500, 500)


def test_dropped_rows_are_counted_by_cause(tiny_recipe: dict[str, Any], tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    left_out = [LINES[name][1] for name in ("no answer", "too many words", "no answer")]
    file.write_bytes(MANY + b"".join(json.dumps(row).encode() + b"\n" for row in left_out))
    policies = ["data.on_bad_row=drop", "data.overlength=drop", "data.max_dropped=0.1", "training.max_steps=1"]
    assert train(file, tiny_recipe, "chat", *policies).code == 0
    counts = json.loads((tmp_path / "run" / "data_report.json").read_text())["train"]
    assert [counts[key] for key in ("read", "too_long", "bad", "used")] == [503, 1, {"without target tokens": 2}, 500]

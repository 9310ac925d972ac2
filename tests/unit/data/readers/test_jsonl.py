"""JSONL files: rows in order, and a short error with its place for every kind of bad row."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.data.readers.content import LONGEST_LINE_BYTES
from finetune.data.readers.jsonl import read_jsonl
from finetune.data.readers.options import Options
from finetune.errors import DataError


def write(folder: Path, content: bytes) -> Path:
    file = folder / "rows.jsonl"
    file.write_bytes(content)
    return file


def error_of(file: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        list(read_jsonl(file, Options()))
    return caught.value


@pytest.mark.parametrize(
    ("content", "texts", "lines"),
    [
        pytest.param(b'{"a": "x"}\n{"a": "y"}\n', ["x", "y"], [1, 2], id="plain"),
        pytest.param(b'{"a": "x"}\n{"a": "y"}', ["x", "y"], [1, 2], id="no final newline"),
        pytest.param(b'\xef\xbb\xbf{"a": "x"}\n', ["x"], [1], id="byte order mark"),
        pytest.param(b'{"a": "x"}\r\n{"a": "y"}\r\n', ["x", "y"], [1, 2], id="CRLF"),
        pytest.param(b'\n  \n{"a": "x"}\n\t\r\n\n{"a": "y"}\n\n', ["x", "y"], [3, 6], id="blank lines"),
        pytest.param('{"a": "Grüße 日本 🙂"}\n'.encode(), ["Grüße 日本 🙂"], [1], id="unicode"),
        pytest.param(b'{"a": "\\ud83d\\ude42"}\n', ["🙂"], [1], id="escaped pair"),
        pytest.param(b'{"a": "a\\\\ud83d"}\n', ["a\\ud83d"], [1], id="backslash, not an escape"),
        pytest.param('{"a": "x\u2028y\u0085z"}\n'.encode(), ["x\u2028y\u0085z"], [1], id="other line separators"),
        pytest.param(b'  {"a": ""}  \n', [""], [1], id="spaces around, empty text"),
        pytest.param(b"", [], [], id="empty file"),
    ],
)
def test_jsonl_rows_have_line_numbers(tmp_path: Path, content: bytes, texts: list[str], lines: list[int]):
    file = write(tmp_path, content)
    rows = list(read_jsonl(file, Options()))
    assert [row.text("a") for row in rows] == texts
    assert [row.where for row in rows] == [f"{file}:{line}" for line in lines]


BAD_LINES = [
    pytest.param(b'{"a": 1,}', ":2:9", "not valid JSON", id="trailing comma"),
    pytest.param(b"{'a': 1}", ":2:2", "not valid JSON", id="single quotes"),
    pytest.param(b'{"a": "x"', ":2:", "not valid JSON", id="cut off"),
    pytest.param(b'{"a": "x"} {"a": "y"}', ":2:12", "not valid JSON: Extra data", id="two rows on a line"),
    pytest.param(b'[{"a": "x"}]', ":2", 'expected a JSON object, found a list ([{"a": "x"}])', id="list"),
    pytest.param(b'"x"', ":2", 'expected a JSON object, found text ("x")', id="text"),
    pytest.param(b"3", ":2", "expected a JSON object, found a number (3)", id="number"),
    pytest.param(b"null", ":2", "expected a JSON object, found null", id="null"),
    pytest.param(b'{"a": NaN}', ":2", "NaN is not JSON", id="NaN"),
    pytest.param(b'{"a": [-Infinity]}', ":2", "-Infinity is not JSON", id="Infinity"),
    pytest.param(b'{"a": ' + b"9" * 5000 + b"}", ":2", "not valid JSON", id="number of 5000 digits"),
    pytest.param(b'{"a": ' + b"[" * 100_000, ":2", "nested too deeply", id="deep nesting"),
    pytest.param(b'{"a": "x", "b": 1, "a": "y"}', ":2", "key 'a' occurs twice", id="duplicate key"),
    pytest.param(b'{"b": {"a": 1, "a": 1}}', ":2", "key 'a' occurs twice", id="duplicate key inside"),
    pytest.param(b'{"' + b"k" * 900 + b'": 1, "' + b"k" * 900 + b'": 1}', ":2", "key 'kkk", id="long duplicate key"),
    pytest.param(b'{"a": "\xff"}', ":2:8", "byte 0xff is not UTF-8", id="bad UTF-8"),
    pytest.param("{'a': 'ü'}".encode("utf-16"), ":2:1", "byte 0xff is not UTF-8", id="UTF-16"),
    pytest.param(b'{"a": "\\ud83d"}', ":2", "half of an escaped character", id="half a pair"),
    pytest.param(b'{"a": [{"b\\uDE42": 1}]}', ":2", "half of an escaped character", id="half a pair in a key"),
    pytest.param(b"x" * 3000, ":2:1", "not valid JSON", id="long nonsense"),
    pytest.param(b'["' + b"x" * 3000 + b'"]', ":2", "found a list", id="long list"),
]


@pytest.mark.parametrize(("line", "place", "what"), BAD_LINES)
def test_jsonl_error_names_place_and_shows_short_excerpt(tmp_path: Path, line: bytes, place: str, what: str):
    file = write(tmp_path, b'{"a": "good"}\n' + line + b'\n{"a": "good"}\n')
    error = error_of(file)
    assert str(error.where).startswith(f"{file}{place}")
    assert what in error.what
    assert len(error.what) < 120
    assert error.hint


def test_jsonl_rows_before_error_are_read(tmp_path: Path):
    rows = read_jsonl(write(tmp_path, b'{"a": "good"}\nbad\n'), Options())
    assert next(rows).text("a") == "good"
    with pytest.raises(DataError):
        next(rows)


def test_jsonl_nesting_depth_reads_or_raises_data_error(tmp_path: Path):
    for depth in range(950, 1050):
        nested = b"[" * depth + b"]" * depth
        assert "JSON" in error_of(write(tmp_path, nested)).what
        assert "JSON" in error_of(write(tmp_path, b'{"\\ud83d": ' + nested + b"}")).what


def test_jsonl_line_limit_is_16_mib(tmp_path: Path):
    longest = b'{"a": "' + b"x" * (LONGEST_LINE_BYTES - 10) + b'"}\n'
    assert len(longest) == LONGEST_LINE_BYTES
    assert len(list(read_jsonl(write(tmp_path, longest * 2), Options()))) == 2
    error = error_of(write(tmp_path, b"\n" + longest[:7] + b"x" + longest[7:]))
    assert str(error.where).endswith(":2")
    assert "longer than 16 MiB" in error.what

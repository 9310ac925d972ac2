"""JSON files: a list of rows, bare or inside an object, each row and each error with its line and column."""

from __future__ import annotations

from pathlib import Path

import pytest

import finetune.data.readers.json as json_reader

from .helpers import error_of, rows_of, values_of, write


@pytest.mark.parametrize(
    ("content", "places"),
    [
        pytest.param('[{"a": "x"}, {"a": "y"}]', ["1:2", "1:14"], id="list"),
        pytest.param('[\n  {\n    "a": "x"\n  },\n  {"a": "y"}\n]\n', ["2:3", "5:3"], id="list over lines"),
        pytest.param('{"rows": [{"a": "x"},\n{"a": "y"}]}', ["1:11", "2:1"], id="object with a list"),
        pytest.param('{"n": 2, "d": [{"a": "x"},{"a": "y"}], "v": {"w": [1]}}', ["1:16", "1:27"], id="among others"),
        pytest.param('\ufeff [{"a": "x"},\r\n{"a": "y"}]', ["1:3", "2:1"], id="byte order mark and CRLF"),
    ],
)
def test_json_rows_are_in_order_with_places(tmp_path: Path, content: str, places: list[str]):
    file = write(tmp_path, "rows.json", content)
    rows = rows_of(file)
    assert [row.text("a") for row in rows] == ["x", "y"]
    assert [row.where for row in rows] == [f"{file}:{place}" for place in places]


@pytest.mark.parametrize("content", ["[]", " [ ] \n", '{"rows": []}'])
def test_json_empty_list_reads_no_rows(tmp_path: Path, content: str):
    assert rows_of(write(tmp_path, "rows.json", content)) == []


@pytest.mark.parametrize(
    ("content", "place", "what"),
    [
        ("", "1:1", "expected [ or {, found the end"),
        ("3", "1:1", "expected [ or {, found 3"),
        ("[{}", "1:4", "expected , or ], found the end"),
        ("[{},]", "1:5", "Expecting value"),
        ("[{}\n{}]", "2:1", "expected , or ], found {"),
        ("[{}] x", "1:6", "Extra data"),
        ('[{"a": 1},\n {"a": 1,}]', "2:10", "not valid JSON"),
        ("[{},\n  3]", "2:3", "expected a JSON object, found a number (3)"),
        ('[{},\n  {"a": NaN}]', "2:3", "NaN is not JSON"),
        ('[{},\n  {"a": 1, "a": 2}]', "2:3", "key 'a' occurs twice"),
        ('[{},\n  {"a": "\\ud83d"}]', "2:3", "half of an escaped character"),
        ('[{"b": ' + "[" * 100_000, "1:2", "nested too deeply"),
        ("{}", "1:2", "the object has no list of rows"),
        ('{"a": "x"}\n{"a": "y"}', "1:2", "the object has no list of rows"),
        ('{"a": [], "b": []}', "1:16", "the object has a second list"),
        ("{3: []}", "1:2", 'expected ", found 3'),
        ('{"a" []}', "1:6", "expected :, found ["),
        ('{"a": []', "1:9", "expected ,, found the end"),
    ],
)
def test_json_error_names_line_and_column(tmp_path: Path, content: str, place: str, what: str):
    file = write(tmp_path, "rows.json", content)
    error = error_of(file)
    assert (error.where, what in error.what) == (f"{file}:{place}", True), error.what


def test_json_error_of_invalid_utf8_names_line_and_column(tmp_path: Path):
    file = write(tmp_path, "rows.json", b'[{"a": "x"},\n{"a": "\xff"}]')
    assert error_of(file).where == f"{file}:2:8"


def test_json_rows_before_error_are_read(tmp_path: Path):
    rows = json_reader.read_json(write(tmp_path, "rows.json", '[{"a": "x"}, 3'), None)  # type: ignore[arg-type]
    assert next(rows).text("a") == "x"


def test_json_file_above_size_limit_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_reader, "LONGEST_FILE_BYTES", 1 << 20)
    padding = " " * ((1 << 20) - 2)
    assert values_of(write(tmp_path, "rows.json", f"[{padding}]")) == []
    assert "longer than 1 MiB" in error_of(write(tmp_path, "rows.json", f"[{padding} ]")).what

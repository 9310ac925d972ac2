"""CSV files: cells as text under the header's names, and every error with its line and column."""

from __future__ import annotations

import csv
import logging
import random
from pathlib import Path

import pytest

from finetune.data.readers.content import LONGEST_LINE_BYTES
from finetune.data.readers.files import read_files
from finetune.data.readers.options import Options
from finetune.errors import DataError

from .helpers import PLAIN, error_of, rows_of, values_of, write


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("a,b\nx,y\n", id="comma"),
        pytest.param("a;b\nx;y\n", id="semicolon"),
        pytest.param("a\tb\nx\ty\n", id="tab"),
        pytest.param("\ufeffa,b\r\nx,y\r\n", id="byte order mark and CRLF"),
        pytest.param("a,b\nx,y", id="no final newline"),
        pytest.param('"a","b"\n"x","y"\n', id="quoted"),
        pytest.param("\na,b\n\nx,y\n  \n", id="blank lines"),
    ],
)
def test_csv_row_has_cells_under_header_names(tmp_path: Path, content: str):
    assert values_of(write(tmp_path, "rows.csv", content)) == [{"a": "x", "b": "y"}]


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ('"x, y"', "x, y"),
        ('"x ""y"" z"', 'x "y" z'),
        ('""', ""),
        ('""""', '"'),
        ("", ""),
        (' x "y"', ' x "y"'),
        ('"x\n\ny"', "x\n\ny"),
        ("3", "3"),
    ],
)
def test_csv_quoted_cell_may_hold_anything_and_stays_text(tmp_path: Path, cell: str, value: str):
    assert values_of(write(tmp_path, "rows.csv", f"a,b\n{cell},1\n2,{cell}\n")) == [
        {"a": value, "b": "1"},
        {"a": "2", "b": value},
    ]


def test_csv_row_place_is_its_first_line(tmp_path: Path):
    file = write(tmp_path, "rows.csv", 'a,b\n"x\ny",1\n\nz,2\n')
    assert [row.where for row in rows_of(file)] == [f"{file}:2", f"{file}:5"]


def test_csv_of_one_column_needs_no_delimiter(tmp_path: Path):
    assert values_of(write(tmp_path, "rows.csv", 'text\none\n"two, three"\n')) == [
        {"text": "one"},
        {"text": "two, three"},
    ]


def test_csv_sniffing_ignores_delimiters_in_quotes(tmp_path: Path):
    assert values_of(write(tmp_path, "rows.csv", '"a;b;c",d\nx,y\n')) == [{"a;b;c": "x", "d": "y"}]


def test_csv_delimiter_of_recipe_overrides_sniffing(tmp_path: Path):
    file = write(tmp_path, "rows.csv", "a,x|b\n1,2|3\n")
    assert values_of(file, Options(delimiter="pipe")) == [{"a,x": "1,2", "b": "3"}]


@pytest.mark.parametrize("content", ["", "\n\n", "a,b\n"])
def test_csv_file_without_rows_reads_none(tmp_path: Path, content: str):
    assert rows_of(write(tmp_path, "rows.csv", content)) == []


@pytest.mark.parametrize(
    ("content", "place", "what"),
    [
        ("a,b\nx,y\nx,y,z\n", "3", "expected 2 cells as in the header, found 3"),
        ("a,b\nx\n", "2", "expected 2 cells as in the header, found 1"),
        ('a,b\n"x\ny",1,2,3\n', "2", "found 4"),
        ("a,b,a\n", "1", "the header names column 'a' twice"),
        ("a,,b\n", "1", "column 2 has no name"),
        ("a,b,\n", "1", "column 3 has no name"),
        ('a,"b\n', "1", "the quote is not closed"),
        ('a,b\nx,"y\nz\n', "2, column 'b'", "the quote is not closed"),
        ('a,b\nx,"y"z\n', "2, column 'b'", "after the closing quote"),
        ('a,b\n"x""\n" ,y\n', "2, column 'a'", "after the closing quote"),
        ('a,b\n"x,""\n""",y,"z" \n', "2", "after the closing quote"),
        ("a,b\nx,y\rz\n", "2, column 'b'", "carriage return"),
    ],
)
def test_csv_error_names_line_and_column(tmp_path: Path, content: str, place: str, what: str):
    file = write(tmp_path, "rows.csv", content)
    error = error_of(file)
    assert (error.where, what in error.what) == (f"{file}:{place}", True), error.what


@pytest.mark.parametrize("cell", ["x\0y", '"x\0\ry"', "x" * (1 << 20)], ids=["NUL", "NUL and CR in quotes", "1 MiB"])
def test_csv_cell_of_odd_characters_or_size_is_kept(tmp_path: Path, cell: str):
    assert values_of(write(tmp_path, "rows.csv", f"a,b\n{cell},1\n")) == [{"a": cell.strip('"'), "b": "1"}]


def test_csv_rows_are_read_one_at_a_time(tmp_path: Path):
    """A fault at the end of a file shows only after the rows before it have been read."""
    rows = read_files(str(write(tmp_path, "rows.csv", 'a\nx\ny\n"z\n')), PLAIN)
    assert [next(rows).values["a"] for _ in range(2)] == ["x", "y"]
    with pytest.raises(DataError, match="not closed"):
        next(rows)


def test_csv_unclosed_quote_stops_at_row_size_limit(tmp_path: Path):
    line = "x" * (LONGEST_LINE_BYTES // 4) + "\n"
    file = write(tmp_path, "rows.csv", 'a\n"' + line * 5 + '"\n')
    assert "not closed" in error_of(file).what
    assert len(rows_of(write(tmp_path, "rows.csv", 'a\n"' + line * 3 + '"\n'))) == 1


def test_csv_written_by_standard_library_reads_back(tmp_path: Path):
    random_ = random.Random(7)
    for delimiter in ",;\t":
        columns = [f"column{index}" for index in range(4)]
        cells = [["".join(random_.choices('ab ,;\t"\n', k=6)) for _ in columns] for _ in range(200)]
        file = tmp_path / "rows.csv"
        with file.open("w", newline="") as stream:
            csv.writer(stream, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(
                [columns, *cells]
            )
        assert [list(values.values()) for values in values_of(file)] == cells


@pytest.mark.parametrize("name", ["", '""', " ", "Unnamed: 0", "Unnamed: 0.1", '"Unnamed: 0.1.1"'])
@pytest.mark.parametrize(
    "numbers",
    [["0", "1", "2"], ["1", "2", "3"], ['"1"', '"2"', '"3"'], ["17", "3", "940"]],
    ids=["pandas", "R", "quoted", "after a selection"],
)
def test_csv_index_column_is_not_read_and_noted(
    tmp_path: Path, name: str, numbers: list[str], caplog: pytest.LogCaptureFixture
):
    rows = "".join(f"{number},x,y{index}\n" for index, number in enumerate(numbers))
    file = write(tmp_path, "rows.csv", f"{name},a,b\n{rows}")
    with caplog.at_level(logging.INFO):
        assert values_of(file) == [{"a": "x", "b": f"y{index}"} for index in range(len(numbers))]
    assert str(file) in caplog.text


@pytest.mark.parametrize(
    ("content", "place", "what"),
    [
        (",a\nx,1\n", "2", "'x'"),
        (",a\n0,1\n1,2\nx,3\n", "4", "'x'"),
        (",a\n0,1\n,2\n", "3", "''"),
        (",a\n-1,1\n", "2", "'-1'"),
        (",a\n0.5,1\n", "2", "'0.5'"),
        (",,a\n0,0,1\n", "1", "column 2"),
        ("Unnamed: 0,a\n0,1\nx,2\n", "3", "'x'"),
    ],
)
def test_csv_nameless_column_without_numbers_raises_with_fix(tmp_path: Path, content: str, place: str, what: str):
    error = error_of(write(tmp_path, "rows.csv", content))
    assert error.where == f"{tmp_path / 'rows.csv'}:{place}"
    assert what in error.what
    assert "index=False" in str(error.hint)


@pytest.mark.parametrize("name", ["index", "id", "0", "Unnamed: 1", "unnamed", "Unnamed: 0"])
def test_csv_first_column_with_a_name_is_read(tmp_path: Path, name: str):
    cell = "x" if name == "Unnamed: 0" else "0"
    assert values_of(write(tmp_path, "rows.csv", f"{name},a\n{cell},1\n")) == [{name: cell, "a": "1"}]


@pytest.mark.parametrize("cell", ['"[""a"", ""b""]"', '"{""k"": 1}"', "['a' 'b']", "[1 2 3]", "[", "{}", "null"])
def test_csv_cell_that_looks_like_json_stays_text(tmp_path: Path, cell: str):
    (row,) = rows_of(write(tmp_path, "rows.csv", f"a\n{cell}\n"))
    assert row.text("a") == cell.strip('"').replace('""', '"')
    assert row.typing == "none"

"""CSV files: cells as text under the header's names, and every fault with its line and column."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest

from finetune.data.readers.content import LONGEST_LINE_BYTES
from finetune.data.readers.options import Options

from .reading import error_of, rows_of, values_of, write


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
def test_a_row_has_its_cells_under_the_names_of_the_header(tmp_path: Path, content: str):
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
def test_a_cell_may_hold_anything_in_quotes_and_stays_text(tmp_path: Path, cell: str, value: str):
    assert values_of(write(tmp_path, "rows.csv", f"a,b\n{cell},1\n2,{cell}\n")) == [
        {"a": value, "b": "1"},
        {"a": "2", "b": value},
    ]


def test_a_row_stands_where_it_begins_whatever_its_cells_hold(tmp_path: Path):
    file = write(tmp_path, "rows.csv", 'a,b\n"x\ny",1\n\nz,2\n')
    assert [row.where for row in rows_of(file)] == [f"{file}:2", f"{file}:5"]


def test_one_column_needs_no_delimiter(tmp_path: Path):
    assert values_of(write(tmp_path, "rows.csv", 'text\none\n"two, three"\n')) == [
        {"text": "one"},
        {"text": "two, three"},
    ]


def test_delimiters_in_quotes_do_not_count(tmp_path: Path):
    assert values_of(write(tmp_path, "rows.csv", '"a;b;c",d\nx,y\n')) == [{"a;b;c": "x", "d": "y"}]


def test_the_recipes_delimiter_comes_before_that_of_the_header(tmp_path: Path):
    file = write(tmp_path, "rows.csv", "a,x|b\n1,2|3\n")
    assert values_of(file, Options(delimiter="pipe")) == [{"a,x": "1,2", "b": "3"}]


@pytest.mark.parametrize("content", ["", "\n\n", "a,b\n"])
def test_a_file_without_rows_has_none(tmp_path: Path, content: str):
    assert rows_of(write(tmp_path, "rows.csv", content)) == []


@pytest.mark.parametrize(
    ("content", "place", "what"),
    [
        ("a,b\nx,y\nx,y,z\n", "3:5", "expected 2 cells as in the header, found 3"),
        ("a,b\nx\n", "2:1", "expected 2 cells as in the header, found 1"),
        ('a,b\n"x\ny",1,2,3\n', "3:6", "found 4"),
        ("a,b,a\n", "1:5", "the header names column 'a' twice"),
        ("a,,b\n", "1:3", "nameless"),
        ("a,b,\n", "1:5", "nameless"),
        ('a,b\nx,"y\nz\n', "2:3", "the quote is not closed"),
        ('a,b\nx,"y"z\n', "2:6", "expected ',' or the end of the line after the closing quote, found 'z'"),
        ('a,b\n"x\n" ,y\n', "3:2", "after the closing quote"),
    ],
)
def test_a_fault_is_named_with_its_line_and_column(tmp_path: Path, content: str, place: str, what: str):
    file = write(tmp_path, "rows.csv", content)
    error = error_of(file)
    assert (error.where, what in error.what) == (f"{file}:{place}", True), error.what


def test_a_quote_left_open_ends_at_the_limit_of_a_row(tmp_path: Path):
    line = "x" * (LONGEST_LINE_BYTES // 4) + "\n"
    file = write(tmp_path, "rows.csv", 'a\n"' + line * 5 + '"\n')
    assert "not closed" in error_of(file).what
    assert len(rows_of(write(tmp_path, "rows.csv", 'a\n"' + line * 3 + '"\n'))) == 1


def test_what_the_standard_library_writes_is_read_back(tmp_path: Path):
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

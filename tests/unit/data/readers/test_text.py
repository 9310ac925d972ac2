"""Plain text: rows are files, lines or paragraphs."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from finetune.data.readers.content import LONGEST_LINE_BYTES
from finetune.data.readers.options import Options
from finetune.recipe.sections.data import TextSplit

from .helpers import error_of, rows_of, write

POEM = "\n\nOne\n  two\n \n\nthree\r\nfour\n"


@pytest.mark.parametrize(
    ("split", "texts", "places"),
    [
        ("file", ["\n\nOne\n  two\n \n\nthree\nfour\n"], [""]),
        ("line", ["One", "  two", "three", "four"], [":3", ":4", ":7", ":8"]),
        ("paragraph", ["One\n  two", "three\nfour"], [":3", ":7"]),
    ],
)
@pytest.mark.parametrize("name", ["poem.txt", "poem.md"])
def test_text_split_decides_rows(tmp_path: Path, name: str, split: TextSplit, texts: list[str], places: list[str]):
    file = write(tmp_path, name, POEM)
    rows = rows_of(file, Options(split=split))
    assert [row.values for row in rows] == [{"text": text} for text in texts]
    assert [row.where for row in rows] == [f"{file}{place}" for place in places]


@pytest.mark.parametrize("split", get_args(TextSplit))
def test_text_of_white_space_has_no_rows(tmp_path: Path, split: TextSplit):
    assert rows_of(write(tmp_path, "poem.txt", " \n\t\r\n"), Options(split=split)) == []


@pytest.mark.parametrize("split", get_args(TextSplit))
def test_text_error_of_invalid_utf8_names_line_and_column(tmp_path: Path, split: TextSplit):
    file = write(tmp_path, "poem.txt", "grün\nrot\n".encode("latin-1"))
    assert error_of(file, Options(split=split)).where == f"{file}:1:3"


@pytest.mark.parametrize("split", get_args(TextSplit))
def test_text_row_above_limit_raises(tmp_path: Path, split: TextSplit):
    line = "x" * (LONGEST_LINE_BYTES // 4 - 1) + "\n"
    assert rows_of(write(tmp_path, "poem.txt", line * 4), Options(split=split))
    too_long = "x" * (LONGEST_LINE_BYTES + 1) if split == "line" else line * 4 + "x"
    assert "longer than 16 MiB" in error_of(write(tmp_path, "poem.txt", too_long), Options(split=split)).what

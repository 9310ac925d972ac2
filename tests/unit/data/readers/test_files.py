"""Data files of a path: a file, a pattern or a folder; known kinds only, in one order everywhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune.data.readers.files import READERS, data_files, read_files
from finetune.data.readers.options import Options
from finetune.errors import DataError

from .helpers import PLAIN, error_of, values_of, write

COLUMNS = Options()
"""Options of a source that needs columns and cannot use plain text."""

LINE = '{"text": "x"}\n'


def names_in(folder: Path, path: Path, options: Options = COLUMNS) -> list[str]:
    return [str(file.relative_to(folder)) for file in data_files(str(path), options)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a/z.csv", "a/y.JSON", "c.parquet", "d.tsv.gz", "a/e.txt", "README.md"):
        write(tmp_path, name, LINE)
    for name in (
        "script.py",
        "model.bin",
        ".hidden.jsonl",
        ".git/x.jsonl",
        "e.parquet.gz",
        "e.arrow.zst",
        "noise.gz",
        "bare",
    ):
        write(tmp_path, name, LINE)
    (tmp_path / "folder.jsonl").mkdir()
    return tmp_path


def test_data_files_of_folder_are_known_kinds_sorted(folder: Path):
    assert names_in(folder, folder) == ["a/y.JSON", "a/z.csv", "b.jsonl", "c.parquet", "d.tsv.gz"]


def test_data_files_include_plain_text_only_for_text_sources(folder: Path):
    assert "a/e.txt" in names_in(folder, folder, PLAIN)
    assert "a/e.txt" not in names_in(folder, folder)
    assert names_in(folder, folder / "*.md", PLAIN) == ["README.md"]
    error = error_of(folder / "README.md", COLUMNS)
    assert "needs a source of format text" in str(error.hint)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jsonl", ["b.jsonl"]),
        ("a/*", ["a/y.JSON", "a/z.csv"]),
        ("**/*", ["a/y.JSON", "a/z.csv", "b.jsonl", "c.parquet", "d.tsv.gz"]),
        ("[bc].*", ["b.jsonl", "c.parquet"]),
    ],
)
def test_data_files_of_pattern_are_known_kinds_sorted(folder: Path, pattern: str, names: list[str]):
    assert names_in(folder, folder / pattern) == names


def test_data_files_of_file_named_like_pattern_is_that_file(tmp_path: Path):
    file = write(tmp_path, "rows[1].jsonl", LINE)
    assert data_files(str(file), COLUMNS) == [file]


def test_read_files_concatenates_rows(tmp_path: Path):
    write(tmp_path, "2.csv", "text\nthree\n")
    write(tmp_path, "1.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    assert [values["text"] for values in values_of(tmp_path)] == ["one", "two", "three"]


@pytest.mark.parametrize("name", ["rows.xml", "rows", "rows.gz", "rows.parquet.gz", "rows.jsonl.zip", "rows.pkl"])
def test_data_file_of_unknown_kind_raises_with_supported_kinds(tmp_path: Path, name: str):
    error = error_of(write(tmp_path, name, LINE))
    assert error.where == str(tmp_path / name)
    assert all(kind in error.what for kind in READERS)


@pytest.mark.parametrize("path", [".", "*.jsonl", "[a", "none/*.csv"])
def test_folder_or_pattern_without_data_files_raises(tmp_path: Path, path: str):
    write(tmp_path, "notes.log", LINE)
    error = error_of(tmp_path / path)
    assert error.where == str(tmp_path / path)


@pytest.mark.parametrize("name", ["none.jsonl", "bare/x.jsonl", "nul\0.jsonl", "x" * 300 + ".jsonl"])
def test_missing_file_raises_with_its_path(folder: Path, name: str):
    error = error_of(folder / name)
    assert (error.what, error.where) == ("there is no such file", str(folder / name))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_raises_with_its_path(folder: Path):
    (folder / "b.jsonl").chmod(0)
    assert "cannot be read" in error_of(folder / "b.jsonl").what


def test_delimiter_without_csv_files_raises(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="none of its files has cells"):
        list(read_files(str(file), Options("comma")))

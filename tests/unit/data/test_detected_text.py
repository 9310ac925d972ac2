"""A text file that a source names is read as text; a text file among data files is not."""

from __future__ import annotations

import json
from pathlib import Path

from finetune.data.sources import read_rows
from finetune.recipe.sections.data import AutoSource


def test_source_naming_text_file_reads_it_as_row(tmp_path: Path):
    (tmp_path / "book.txt").write_text("Once upon a time")
    rows = list(read_rows(AutoSource(path=str(tmp_path / "book.txt"))))
    assert [row.values["text"] for row in rows] == ["Once upon a time"]


def test_source_folder_skips_readme(tmp_path: Path):
    (tmp_path / "README.md").write_text("About")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    assert [row.values for row in read_rows(AutoSource(path=str(tmp_path)))] == [{"text": "a"}]

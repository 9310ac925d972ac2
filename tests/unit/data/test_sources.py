"""Sources: rows of files or of the hub by their section, and the files for the record."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.data import sources
from finetune.data.rows import Row
from finetune.data.sources import files_of, read_rows
from finetune.errors import DataError
from finetune.recipe.sections.data import Data, Hub, TextSource


def test_files_of_source_match_path(tmp_path: Path):
    for name in ("b.jsonl", "a.csv", "notes.txt"):
        (tmp_path / name).touch()
    train = [
        {"format": "chat", "path": f"{tmp_path}/[ab].*"},
        {"format": "chat", "path": f"{tmp_path}/b.jsonl"},
        {"format": "chat", "hub": {"name": "org/name"}},
    ]
    files = [files_of(source) for source in Data.model_validate({"train": train}).train]
    assert [[file.name for file in each] for each in files] == [["a.csv", "b.jsonl"], ["b.jsonl"], []]


def test_source_options_reach_reader(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.csv").write_text("text|x;y\nthree|4\n")
    source = TextSource(format="text", path=str(tmp_path), split="line", delimiter="pipe")
    assert [row.text("text") for row in read_rows(source)] == ["one", "two", "three"]


def test_hub_source_is_read_from_hub(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "read_hub", lambda hub: iter([Row({"text": hub.name}, "row")]))
    source = TextSource(format="text", hub=Hub(name="org/name"))
    assert [row.text("text") for row in read_rows(source)] == ["org/name"]


def test_text_split_without_plain_text_files_raises(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    path = str(tmp_path / "a.jsonl")
    assert [row.text("text") for row in read_rows(TextSource(format="text", path=path))] == ["one"]
    with pytest.raises(DataError, match="none of its files is plain text") as caught:
        read_rows(TextSource(format="text", path=path, split="line"))
    assert caught.value.where == path

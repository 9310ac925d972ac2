"""Provenance: the record changes when the inputs of a run do."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import pytest

from finetune import __version__
from finetune.run import provenance as module
from finetune.run.provenance import file_digest, file_record, provenance
from finetune.storage.opening import HashedFile


def test_file_digest_is_sha256(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    content = b"{}\n" * 100_000
    file.write_bytes(content)
    assert file_digest(file) == hashlib.sha256(content).hexdigest()


def test_provenance_hashes_recipe_and_data_files(tmp_path: Path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("{}\n")
    second.write_text("")
    record = provenance("recipe", [file_record(HashedFile.read(each)) for each in (first, second)], {})
    assert record["recipe_sha256"] == hashlib.sha256(b"recipe").hexdigest()
    assert record["data"] == [
        {"file": "a.jsonl", "bytes": 3, "sha256": file_digest(first)},
        {"file": "b.jsonl", "bytes": 0, "sha256": hashlib.sha256().hexdigest()},
    ]


def test_provenance_changes_with_one_byte_of_input(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text("1\n")
    before = provenance("recipe", [file_record(HashedFile.read(file))], {})
    assert provenance("recipe", [file_record(HashedFile.read(file))], {}) == before
    assert provenance("Recipe", [file_record(HashedFile.read(file))], {})["recipe_sha256"] != before["recipe_sha256"]
    file.write_text("2\n")
    assert provenance("recipe", [file_record(HashedFile.read(file))], {})["data"] != before["data"]


def test_provenance_records_installed_versions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PACKAGES", ("torch", "a-package-that-is-not-there"))
    record = provenance("", [], {})
    assert record["ft"] == __version__
    assert record["packages"] == {"torch": version("torch"), "a-package-that-is-not-there": None}


def test_provenance_includes_facts_of_caller_as_json():
    record = provenance("", [], {"device": "cpu", "base": {"name": "tiny", "commit": None}})
    assert record["device"] == "cpu"
    assert json.loads(json.dumps(record)) == record


def test_provenance_contains_no_local_paths(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.touch()
    assert str(tmp_path) not in json.dumps(provenance("", [file_record(HashedFile.read(file))], {}))

"""Ends of answers in the generation settings of a written model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from finetune.models.writing.ends import write_ends
from tests.fixtures.tiny import tiny_config


def model_folder(folder: Path, settings: dict[str, Any] | None) -> Path:
    """A folder with a config whose end is 257, and with generation settings, if there are any."""
    folder.mkdir()
    tiny_config().save_pretrained(folder)
    if settings is not None:
        (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "generation_config.json").read_text())


@pytest.mark.parametrize(
    ("own", "answer_ends", "expected"),
    [
        (7, [9], [7, 9]),
        ([7, 8], [9, 7], [7, 8, 9]),
        ([8, 7, 8], [7], [8, 7]),
        (None, [9, 7], [9, 7]),
    ],
)
def test_write_ends_adds_those_of_the_training_after_those_of_the_base(
    tmp_path: Path, own: Any, answer_ends: list[int], expected: list[int]
):
    base = model_folder(tmp_path / "base", {"eos_token_id": own, "pad_token_id": 3, "temperature": 0.6})
    write_ends(base, answer_ends, tmp_path)
    assert written(tmp_path) == {"eos_token_id": expected, "pad_token_id": 3, "temperature": 0.6}
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == expected


def test_write_ends_of_a_base_without_settings_takes_those_of_its_config(tmp_path: Path):
    base = model_folder(tmp_path / "base", None)
    write_ends(base, [258], base)
    assert GenerationConfig.from_pretrained(base).eos_token_id == [257, 258]
    assert GenerationConfig.from_pretrained(base).bos_token_id == 256


@pytest.mark.parametrize("settings", [None, {"eos_token_id": 7}])
def test_write_ends_of_a_run_that_recorded_none_changes_nothing(tmp_path: Path, settings: dict[str, Any] | None):
    base = model_folder(tmp_path / "base", settings)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    write_ends(base, [], base)
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before


def test_write_ends_twice_changes_nothing_more(tmp_path: Path):
    base = model_folder(tmp_path / "base", {"_from_model_config": True, "eos_token_id": 7})
    write_ends(base, [9], base)
    once = written(base)
    write_ends(base, [9], base)
    assert written(base) == once == {"eos_token_id": [7, 9]}

"""The tokens that end an answer, in the generation settings of a written model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.models.loading.folder_check import GENERATION_CONFIG
from finetune.models.loading.load import generation_settings, named_ends
from finetune.storage.files import write_json
from finetune.storage.opening import read_json


def ends_with(source: Path, answer_ends: Sequence[int]) -> list[int]:
    """The ends that a model's generation settings name, and then those of the training; each once.

    Args:
        source: The model's folder.
        answer_ends: Tokens that end trained answers.

    Raises:
        ModelError: The settings cannot be read.
    """
    return list(dict.fromkeys([*named_ends(generation_settings(source)), *answer_ends]))


def write_ends(source: Path, answer_ends: Sequence[int], folder: Path) -> None:
    """Write the generation settings of a model with the ends of the training added to its own.

    Nothing is written for a run that recorded no ends.

    Args:
        source: Folder of the model that the settings come from.
        answer_ends: Tokens that end trained answers.
        folder: Where to write `generation_config.json`; it may be the same folder.

    Raises:
        ModelError: The settings cannot be read.
    """
    if not answer_ends:
        return
    settings = {**_settings(source), "eos_token_id": ends_with(source, answer_ends)}
    settings.pop("_from_model_config", None)  # transformers 4 would take the ends from config.json again
    write_json(folder / GENERATION_CONFIG, settings)


def _settings(source: Path) -> dict[str, Any]:
    """The settings as they stand in the file; without one, those that transformers takes from the model's config."""
    # Not through `save_pretrained`: it refuses settings of published models that contradict each other.
    file = source / GENERATION_CONFIG
    if file.is_file():
        found: dict[str, Any] = read_json(file)
        return found
    settings: dict[str, Any] = generation_settings(source).to_diff_dict()
    return settings

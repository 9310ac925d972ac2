"""A key is set in a recipe's text, and nothing else of the text changes."""

from __future__ import annotations

import pytest
import yaml

from finetune.recipe.yaml.edit import edited

TEXT = """\
# What it is for
model: {name: org/name}   # the base
optimizer:
  # why this one
  name: "adamw"   # in 32 bits
  learning_rate: 1.0e-3
training:
  epochs: 1
"""


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"optimizer.name": "adamw_8bit"}, "  name: adamw_8bit   # in 32 bits"),
        ({"training.epochs": "2"}, "  epochs: 2"),
        ({"training.micro_batch_size": "1"}, "  micro_batch_size: 1"),
        ({"model.dtype": "float32"}, "model: {dtype: float32, name: org/name}   # the base"),
        ({"quantization.kind": "nf4"}, "  kind: nf4"),
        ({"adapter.r": "8", "adapter.alpha": "16"}, "  alpha: 16"),
    ],
)
def test_edited_sets_key_and_keeps_comments(changes: dict[str, str], line: str):
    text = edited(TEXT, changes)
    assert line in text.splitlines()
    assert [each for each in TEXT.splitlines() if "#" in each and "adamw" not in each and "model" not in each] == [
        each for each in text.splitlines() if "#" in each and "adamw" not in each and "model" not in each
    ]
    expected = yaml.safe_load(TEXT)
    for key, value in changes.items():
        section, name = key.split(".")
        expected.setdefault(section, {})[name] = yaml.safe_load(value)
    assert yaml.safe_load(text) == expected


@pytest.mark.parametrize("text", ["training:\n", "training: {}\n", "training:   # nothing yet\n", ""])
def test_edited_adds_key_to_empty_section(text: str):
    assert yaml.safe_load(edited(text, {"training.epochs": "2"})) == {"training": {"epochs": 2}}

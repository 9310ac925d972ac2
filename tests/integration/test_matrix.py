"""Every combination of method, initialization, quantizer and kind of layer trains and merges, or is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from finetune.adapters import peft_bridge
from finetune.adapters.targets import Targets
from finetune.errors import RefusedError
from tests.fixtures.matrix import (
    Combination,
    changed_weights,
    combinations,
    logits_of,
    named_weights,
    outcome_of,
    write_models,
)
from tests.fixtures.recipes import as_recipe

ALL = combinations()
TOLERANCE = 2e-5
"""Largest difference of log-probabilities that the order of float32 sums explains."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("matrix"))


def check(combination: Combination, models: Path, folder: Path) -> str:
    """`trained`, `refused` or `invalid`."""
    outcome = outcome_of(combination, models, folder)
    if outcome.run is None:
        assert all(key.partition(".")[0] in ("adapter", "quantization", "modules") for key in outcome.keys)
        assert not (folder / "run").exists() or not (folder / "run" / "adapter").exists()
        return "refused"
    assert len(outcome.losses) == 2
    assert all(map(math.isfinite, outcome.losses))
    recipe = as_recipe(combination.sections(models), folder)
    if combination.quantizer != "none" or recipe.adapter.standalone_by != "merge" or recipe.adapter.trains_base:
        return "trained"
    base, run = models / combination.base, outcome.run
    changed, named = changed_weights(base, run.merged), named_weights(base, recipe)
    if recipe.adapter.method == "adalora":  # it has pruned some layers to rank 0
        assert changed
        assert changed <= named
    else:
        assert {name for name in changed if not name.endswith(".bias")} == {
            name for name in named if not name.endswith(".bias")
        }
    difference = (logits_of(run.merged) - logits_of(base, run.path / "adapter")).abs().max()
    assert difference <= TOLERANCE
    return "trained"


@pytest.mark.parametrize("combination", [each for each in ALL if each.is_fast], ids=lambda each: each.id)
def test_combination_trains_and_merges_or_is_refused(combination: Combination, models: Path, tmp_path: Path):
    check(combination, models, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("combination", [each for each in ALL if not each.is_fast], ids=lambda each: each.id)
def test_further_combination_trains_and_merges_or_is_refused(combination: Combination, models: Path, tmp_path: Path):
    check(combination, models, tmp_path)


def test_control_layer_that_is_not_adapted_is_found(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Merge and adapter agree with each other then, and only the comparison with the recipe's names shows it."""
    found = peft_bridge.find_targets

    def without_keys(*arguments: Any) -> Targets:
        adapted, excluded = found(*arguments)
        keys = {name: "a control" for name in adapted if name.endswith("k_proj")}
        return Targets({name: layer for name, layer in adapted.items() if name not in keys}, {**excluded, **keys})

    monkeypatch.setattr(peft_bridge, "find_targets", without_keys)
    (lora,) = [each for each in ALL if each.id == "llama-tied-lora on layers-none"]
    with pytest.raises(AssertionError, match="k_proj"):
        check(lora, models, tmp_path)


def test_control_merge_that_loses_an_update_is_found(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (head,) = [each for each in ALL if each.id == "gpt2-tied-lora on head-none"]

    def unmerged(layer: Any) -> Any:
        return layer.get_base_layer()

    monkeypatch.setattr(peft_bridge, "merge_layer", unmerged)
    with pytest.raises(RefusedError):
        check(head, models, tmp_path)

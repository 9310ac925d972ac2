"""Rules that a run keeps when it starts; a recorded recipe that breaks one is still read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from finetune.recipe.load import dump_recipe, load_recipe
from finetune.recipe.rules import start
from finetune.recipe.rules.start import START_RULES, broken_start_rules

from .conftest import Load

BREAKING: dict[str, tuple[tuple[str, ...], str, str]] = {
    "attention_is_installed": (("model.attention=flash_attention_2",), "model.attention", "flash-attn"),
    "base_is_a_model": (("model.name={folder}/adapter",), "model.name", "adapter.continue_from"),
    "sixteen_bit_types_agree": (
        ("model.dtype=float16", "training.precision=bfloat16"),
        "model.dtype",
        "training.precision",
    ),
}
KEEPING: dict[str, tuple[tuple[str, ...], ...]] = {
    "attention_is_installed": (("model.attention=sdpa",), ("model.attention=eager",), ("model.attention=auto",)),
    "base_is_a_model": (("model.name={folder}/model",), ("model.name=org/adapter",), ("model.name=/none",)),
    "sixteen_bit_types_agree": (
        ("model.dtype=float16", "training.precision=float16"),
        ("model.dtype=float16", "training.precision=float32"),
        ("model.dtype=bfloat16", "training.precision=bfloat16"),
        ("model.dtype=auto", "training.precision=bfloat16"),
    ),
}
NAMES = [rule.__name__ for rule in START_RULES]


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "find_spec", lambda name: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an adapter and a model, as far as their configs say."""
    for name, file in (("adapter", "adapter_config.json"), ("model", "config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    return tmp_path


def in_folder(overrides: tuple[str, ...], folder: Path) -> list[str]:
    return [each.format(folder=folder) for each in overrides]


@pytest.mark.parametrize("rule", NAMES)
def test_rule_is_broken_by_a_valid_recipe(rule: str, good: str, load: Load, folder: Path):
    overrides, key, word = BREAKING[rule]
    recipe = load(good, *in_folder(overrides, folder)).recipe
    (violation,) = broken_start_rules(recipe)
    assert violation.key == key
    assert word in violation.what + violation.hint
    recorded = folder / "recipe.resolved.yaml"
    recorded.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(recorded).recipe == recipe


@pytest.mark.parametrize("rule", NAMES)
def test_rule_is_kept_close_to_breaking_it(rule: str, good: str, load: Load, folder: Path):
    for overrides in KEEPING[rule]:
        assert broken_start_rules(load(good, *in_folder(overrides, folder)).recipe) == []


@pytest.mark.parametrize("package", ["flash_attn", "kernels"])
def test_kernel_of_either_package_is_installed(package: str, good: str, load: Load, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(start, "find_spec", lambda name: SimpleNamespace() if name == package else None)
    assert broken_start_rules(load(good, "model.attention=flash_attention_2").recipe) == []


@pytest.mark.parametrize("rule", NAMES)
def test_validate_refuses_with_the_line_of_the_key(rule: str, good: str, folder: Path):
    overrides, key, word = BREAKING[rule]
    recipe = folder / "recipe.yaml"
    recipe.write_text(good, encoding="utf-8")
    options: list[Any] = [option for override in in_folder(overrides, folder) for option in ("--set", override)]
    result = CliRunner().invoke(app, ["validate", str(recipe), *options])
    assert result.exit_code == 2
    assert f"--set {key}" in result.stderr
    assert word in result.stderr

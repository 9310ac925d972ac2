"""A run that starts from the adapter of an earlier run (`adapter.continue_from`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.errors import RefusedError
from finetune.jobs.train.run import train
from finetune.run.directory import RunDirectory
from finetune.run.events import TrainingFinished
from tests.fixtures.recipes import as_recipe

ADAPTERS: list[dict[str, Any]] = [
    {"method": "lora", "r": 4},
    {"method": "lora", "r": 4, "initialization": "pissa"},
    {"method": "lora", "r": 4, "trainable_tokens": ["a"]},
    {"method": "qa_lora", "r": 4, "iec": True},
    {"method": "oft", "block_size": 8},
    {"method": "prompt_tuning", "tokens": 6},
]


def run_of(sections: dict[str, Any], folder: Path, name: str, **adapter: Any) -> TrainingFinished:
    changed = {**sections, "adapter": {**sections["adapter"], **adapter}}
    return train(as_recipe(changed, folder), RunDirectory.create(folder / name))


def sections_of(tiny_recipe: dict[str, Any], adapter: dict[str, Any], kind: str = "affine") -> dict[str, Any]:
    return {**tiny_recipe, "adapter": adapter, "quantization": {"kind": kind}, "optimizer": {"name": "adamw"}}


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: "-".join(map(str, adapter.values())))
def test_continue_from_starts_with_the_loss_of_the_earlier_run(
    tiny_recipe: dict[str, Any], tmp_path: Path, adapter: dict[str, Any]
):
    sections = sections_of(tiny_recipe, adapter)
    first = run_of(sections, tmp_path, "first")
    second = run_of(sections, tmp_path, "second", continue_from=str(tmp_path / "first"))
    assert second.validation_loss_before == pytest.approx(first.validation_loss, rel=1e-6)
    assert second.validation_loss < first.validation_loss < first.validation_loss_before


@pytest.mark.parametrize("template", [None, "mistral"])
def test_continue_from_a_run_with_another_chat_template_is_a_warning(
    template: str | None, tiny_recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run_of(tiny_recipe, tmp_path, "first")
    sections = {**tiny_recipe, "model": {**tiny_recipe["model"], "chat_template": template}}
    run_of(sections, tmp_path, "second", continue_from=str(tmp_path / "first"))
    assert ("another chat template" in caplog.text) is (template is not None)


def test_continue_from_adalora_starts_a_new_rank_schedule(tiny_recipe: dict[str, Any], tmp_path: Path):
    adapter = {"method": "adalora", "r": 4, "target_r": 2, "initial_steps": 1, "final_steps": 1}
    sections = sections_of(tiny_recipe, adapter)
    first = run_of(sections, tmp_path, "first")
    second = run_of(sections, tmp_path, "second", continue_from=str(tmp_path / "first"))
    assert first.validation_loss != first.validation_loss_before
    assert second.validation_loss_before == pytest.approx(first.validation_loss, rel=1e-6)
    assert sum(second.ranks.values()) == sum(first.ranks.values()) == 2 * len(first.ranks)


@pytest.mark.parametrize(
    ("adapter", "key"),
    [
        ({"method": "lora", "r": 4}, "trainable_tokens"),
        ({"method": "trainable_tokens"}, "tokens"),
    ],
    ids=["lora", "trainable_tokens"],
)
@pytest.mark.parametrize("tokens", [["b", "a"], ["c", "d"], ["a", "c"]], ids=str)
def test_continue_from_rows_of_other_tokens_is_refused_by_key(
    tiny_recipe: dict[str, Any], tmp_path: Path, adapter: dict[str, Any], key: str, tokens: list[str]
):
    sections = sections_of(tiny_recipe, {**adapter, key: ["a", "b"]}, "none")
    run_of(sections, tmp_path, "first")
    with pytest.raises(RefusedError, match="rows for the tokens") as caught:
        run_of(sections, tmp_path, "second", continue_from=str(tmp_path / "first"), **{key: tokens})
    assert f'adapter.{key} to those of that run, in their order: ["a", "b"]' in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"adapter": {"method": "lora", "r": 2}}, "other shapes"),
        ({"adapter": {"method": "oft", "block_size": 8}}, "the weights have format"),
        ({"quantization": {"kind": "hqq"}}, "quantized to other weights"),
    ],
)
def test_continue_from_adapter_of_another_shape_or_base_is_refused(
    tiny_recipe: dict[str, Any], tmp_path: Path, change: dict[str, Any], what: str
):
    sections = sections_of(tiny_recipe, ADAPTERS[0])
    run_of(sections, tmp_path, "first")
    with pytest.raises(RefusedError, match=what):
        run_of({**sections, **change}, tmp_path, "second", continue_from=str(tmp_path / "first"))
    assert not (tmp_path / "second").exists()

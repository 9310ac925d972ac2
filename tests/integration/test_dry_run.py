"""A dry run takes the full path, reports what would stop the run, and leaves no trace in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cli.main import app
from finetune.errors import OutOfMemoryError, RefusedError
from finetune.jobs.train import dry_run
from finetune.jobs.train.run import train
from finetune.run.directory import RunDirectory
from finetune.run.events import DryRunPassed, Event
from tests.fixtures.recipes import as_recipe, write_recipe

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"method": "lora", "r": 4, "dropout": 0.1}},
    "qlora": {"adapter": {"method": "lora", "r": 4}, "quantization": {"kind": "nf4"}},
    "adalora": {"adapter": {"method": "adalora", "r": 6, "target_r": 4}},
    "qa-lora": {"adapter": {"method": "qa_lora", "r": 4}, "quantization": {"kind": "affine"}},
    "ia3": {"adapter": {"method": "ia3"}},
    "oft": {"adapter": {"method": "oft", "block_size": 8}},
    "prompt tuning": {"adapter": {"method": "prompt_tuning", "tokens": 4}},
    "full": {"adapter": {"method": "full"}},
}
FOLDED = {"lora", "qlora", "adalora", "qa-lora", "ia3", "oft"}


def sections(tiny_model: Path, chat_file: Path, kind: str, with_dry_run: bool) -> dict[str, Any]:
    return {
        "model": {"name": str(tiny_model)},
        "data": {"train": [{"path": str(chat_file)}], "validation_fraction": 0.25, "max_length": 128},
        "optimizer": {"name": "adamw_8bit", "learning_rate": 1e-2},
        "training": {"max_steps": 6, "micro_batch_size": 2, "gradient_accumulation_steps": 2, "dry_run": with_dry_run},
        "evaluation": {"every_steps": 3},
        **METHODS[kind],
    }


def result(recipe: dict[str, Any], folder: Path) -> tuple[bytes, list[float], list[Event]]:
    """Weights, losses and events of a run."""
    folder.mkdir()
    run, events = RunDirectory.create(folder / "run"), []
    train(as_recipe(recipe, folder), run, events.append)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    (weights,) = run.trained(recipe["adapter"]["method"] == "full").glob("*model.safetensors")
    return weights.read_bytes(), [line["loss"] for line in lines if "loss" in line], events


@pytest.mark.parametrize("kind", METHODS)
def test_run_with_a_dry_run_equals_the_run_without(kind: str, tiny_model: Path, chat_file: Path, tmp_path: Path):
    plain = result(sections(tiny_model, chat_file, kind, with_dry_run=False), tmp_path / "plain")
    rehearsed = result(sections(tiny_model, chat_file, kind, with_dry_run=True), tmp_path / "rehearsed")
    assert rehearsed[:2] == plain[:2]
    (event,) = [event for event in rehearsed[2] if isinstance(event, DryRunPassed)]
    assert event.merged == (kind in FOLDED)
    assert event.tokens > 0
    assert event.checkpoint_bytes > 0
    assert not any(isinstance(event, DryRunPassed) for event in plain[2])
    assert not list((tmp_path / "rehearsed" / "run").glob(".*"))


def test_state_that_the_dry_run_does_not_restore_is_found(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The control: state that is not restored changes the run."""
    plain = result(sections(tiny_model, chat_file, "lora", with_dry_run=False), tmp_path / "plain")
    monkeypatch.setattr(dry_run, "read_state", lambda state, folder: setattr(state, "step", 0))
    assert result(sections(tiny_model, chat_file, "lora", with_dry_run=True), tmp_path / "rehearsed")[0] != plain[0]


def test_dry_run_reports_a_step_that_does_not_fit(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def too_large(*arguments: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(dry_run, "train_step", too_large)
    run = RunDirectory.create(tmp_path / "run")
    with pytest.raises(OutOfMemoryError, match="step 1"):
        train(as_recipe(sections(tiny_model, chat_file, "lora", with_dry_run=True), tmp_path), run)
    assert not run.path.exists()


def test_dry_run_refuses_a_layer_that_merges_wrongly(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fold = dry_run.peft_bridge.merge_layer

    def off(layer: torch.nn.Module) -> torch.nn.Module:
        folded = fold(layer)
        folded.weight.data *= 1.01
        return folded

    monkeypatch.setattr(dry_run.peft_bridge, "merge_layer", off)
    with pytest.raises(RefusedError, match="merged layer"):
        train(
            as_recipe(sections(tiny_model, chat_file, "lora", with_dry_run=True), tmp_path),
            RunDirectory.create(tmp_path / "run"),
        )


def test_dry_run_starts_long_runs_unless_disabled(tmp_path: Path, tiny_model: Path, chat_file: Path):
    recipe = as_recipe(sections(tiny_model, chat_file, "lora", with_dry_run=False), tmp_path)
    automatic = recipe.model_copy(update={"training": recipe.training.model_copy(update={"dry_run": "auto"})})
    assert [dry_run.is_worth_it(automatic.training, steps) for steps in (199, 200)] == [False, True]
    assert not dry_run.is_worth_it(recipe.training, 10_000)


def test_dry_run_command_leaves_no_files(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(sections(tiny_model, chat_file, "lora", with_dry_run=False), tmp_path)
    done = CliRunner().invoke(app, ["rehearse", str(recipe)])
    assert done.exit_code == 0, done.output
    assert "dry run passed in 0:0" in done.output
    assert "one layer merged" in done.output
    assert "next: ft train" in done.output
    assert not list((tmp_path / "runs").iterdir())

"""`ft reproduce` says what changed when a run was resumed, and commands on a run in training name its process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from finetune.jobs.train.run import train
from finetune.run.attempts import changed_on_resume
from finetune.run.directory import RunDirectory
from finetune.run.lock import locked
from tests.fixtures.recipes import as_recipe
from tests.integration.test_merging import run_of


def ft(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def resumed(sections: dict[str, Any], folder: Path, *overrides: str) -> RunDirectory:
    """A run of three steps that is resumed with other settings."""
    run = run_of(sections, folder)
    train(as_recipe(sections, folder, overrides), RunDirectory.open(run.path))
    return run


def test_reproduction_of_a_lengthened_run_names_both_lengths(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = resumed(tiny_recipe, tmp_path, "training.max_steps=5")
    result = ft("reproduce", run.path, "--json")
    assert result.exit_code == 5
    told = "training.max_steps was 3 steps until step 3, then 5 steps"
    assert f"the weights differ: {told}" in " ".join(result.stderr.split())
    assert told in result.stderr.split("error:")[0]  # a warning before the training
    (reproduced,) = (each for each in map(json.loads, result.stdout.splitlines()) if each["event"] == "reproduced")
    assert reproduced["changed"] == [["training.max_steps", "3 steps until step 3, then 5 steps"]]


def test_lengths_of_a_run_by_epochs_are_counted_in_steps(tiny_recipe: dict[str, Any], tmp_path: Path):
    training = {key: value for key, value in tiny_recipe["training"].items() if key != "max_steps"}
    run = resumed({**tiny_recipe, "training": {**training, "epochs": 0.5}}, tmp_path, "training.epochs=1.0")
    assert changed_on_resume(run) == [("training.epochs", "3 steps until step 3, then 6 steps")]


def test_other_keys_that_changed_on_resume_are_named(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = resumed(tiny_recipe, tmp_path, "training.max_steps=4", "evaluation.max_new_tokens=3", "model.kernels=plain")
    keys = dict(changed_on_resume(run))
    assert keys["model.kernels"] == "auto until step 3, then plain"
    assert keys["training.max_steps"] == "3 steps until step 3, then 4 steps"


def test_run_of_one_attempt_has_no_changes(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = run_of(tiny_recipe, tmp_path)
    assert changed_on_resume(run) == []
    result = ft("reproduce", run.path)
    assert result.exit_code == 0
    assert "will differ" not in result.stderr


def test_damaged_checkpoint_hides_no_length(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = resumed(tiny_recipe, tmp_path, "training.max_steps=5", "model.kernels=plain")
    for file in run.checkpoints.glob("*/recipe.resolved.yaml"):
        file.write_text("{")
    assert [key for key, _ in changed_on_resume(run)] == ["training.max_steps"]


@pytest.fixture
def in_training(tiny_recipe: dict[str, Any], tmp_path: Path) -> RunDirectory:
    """A run without weights, whose lock this process holds."""
    run = RunDirectory.create(tmp_path / "run")
    run.begin("", 0)
    run.recipe.write_text("")
    as_recipe(tiny_recipe, tmp_path)
    run.recipe.write_text((tmp_path / "recipe.yaml").read_text())
    return run


@pytest.mark.parametrize(
    "command", [["generate", "-p", "Hi"], ["eval"], ["chat"], ["merge"], ["export", "--format", "gguf"], ["reproduce"]]
)
def test_command_on_a_run_in_training_names_the_process(in_training: RunDirectory, command: list[str]):
    name, *options = command
    result = ft(name, in_training.path, *options)
    assert result.exit_code == 2
    assert f"process {os.getpid()}" in result.stderr
    assert "ft watch" in result.stderr
    assert "--resume" not in result.stderr
    assert not in_training.path.with_name("run-again").exists()


@pytest.mark.parametrize("command", [["generate", "-p", "Hi"], ["merge"], ["reproduce"]])
def test_command_on_a_run_that_stopped_names_the_way_on(in_training: RunDirectory, command: list[str]):
    """The control of the test above."""
    assert in_training._held is not None
    in_training._held.close()
    name, *options = command
    result = ft(name, in_training.path, *options)
    assert result.exit_code == 2
    assert "ft train --resume" in result.stderr
    assert "process" not in result.stderr
    with locked(in_training.lock):
        assert "process" in ft(name, in_training.path, *options).stderr

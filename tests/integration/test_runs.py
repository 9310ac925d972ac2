"""Runs are listed, cleaned, compared and reproduced."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from finetune.errors import Stopped
from finetune.jobs.train.run import train
from finetune.run.directory import RunDirectory
from finetune.run.index import removable, summarize
from tests.fixtures.recipes import as_recipe
from tests.integration.test_resume import after_step, stopped_at


def ft(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def runs(tiny_recipe: dict[str, Any], tmp_path: Path) -> Path:
    """`done`, trained to its end, and `half`, stopped after a step."""
    folder = tmp_path / "runs"
    folder.mkdir()
    train(as_recipe(tiny_recipe, tmp_path), RunDirectory.create(folder / "done"))
    with pytest.raises(Stopped):
        stopped_at(tiny_recipe, RunDirectory.create(folder / "half"), [], after_step(1))
    RunDirectory.create(folder / "new")
    return folder


def test_runs_lists_each_run_with_its_step(runs: Path):
    found = [json.loads(line) for line in ft("runs", "--directory", runs, "--json").stdout.splitlines()]
    assert [(Path(each["path"]).name, each["state"], each["step"]) for each in found] == [
        ("done", "finished", 3),
        ("half", "resumable", 1),
        ("new", "never started", 0),
    ]
    size = sum(file.stat().st_size for file in (runs / "done").rglob("*") if file.is_file())
    assert found[0]["size_bytes"] == size
    lines = [json.loads(line) for line in (runs / "done" / "metrics.jsonl").read_text().splitlines()]
    assert found[0]["validation_loss"] == lines[-1]["loss"]
    shown = ft("runs", "--directory", runs).stdout
    assert "resumable" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_runs_shows_a_run_in_training_and_clean_skips_it(runs: Path):
    run = RunDirectory.open(runs / "done")
    (run.path / ".adapter-1a2b3c4d").mkdir()
    with run.lock.open("a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert summarize(run).state == "training"
        assert removable(run) == []
    assert summarize(run).state == "finished"
    assert removable(run)


def test_runs_clean_prompts_and_keeps_necessary_files(runs: Path):
    leftover = runs / "half" / "checkpoints" / ".tmp-step-00000002"
    leftover.mkdir()
    refused = ft("runs", "clean", "--directory", runs)
    assert refused.exit_code == 2
    assert "nothing was removed" in refused.output
    assert (runs / "done" / "checkpoints").is_dir()
    assert ft("runs", "clean", "--directory", runs, "--yes").exit_code == 0
    assert not (runs / "done" / "checkpoints").exists()
    assert not leftover.exists()
    assert list((runs / "half" / "checkpoints").iterdir())
    assert (runs / "done" / "adapter" / "adapter_model.safetensors").is_file()
    assert ft("eval", runs / "done", "--quiet").exit_code == 0
    assert "nothing to remove" in ft("runs", "clean", "--directory", runs).output


def test_diff_shows_every_kind_of_difference_and_no_others(tiny_recipe: dict[str, Any], runs: Path, tmp_path: Path):
    assert ft("diff", runs / "done", runs / "done").output.strip() == "no difference"
    train(as_recipe(tiny_recipe, tmp_path, ["adapter.r=2"]), RunDirectory.create(runs / "other"))
    provenance = runs / "other" / "provenance.json"
    written = json.loads(provenance.read_text())
    written["packages"]["torch"] = "1.0"
    written["data"][0]["sha256"] = "0" * 64
    provenance.write_text(json.dumps(written))
    found = [json.loads(line) for line in ft("diff", runs / "done", runs / "other", "--json").stdout.splitlines()]
    keys = {(each["part"], each["key"]): (each["first"], each["second"]) for each in found}
    assert keys[("recipe", "adapter.r")][1] == "2"
    assert keys[("versions", "torch")][1] == "1.0"
    assert [key for part, key in keys if part == "data"] == [f"1. {written['data'][0]['file']}"]
    assert ("results", "loss") in keys
    assert {part for part, _ in keys} == {"recipe", "versions", "data", "results"}


def test_reproduce_equals_the_run_bit_for_bit(runs: Path):
    result = ft("reproduce", runs / "done", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["is_identical"]
    assert "adapter_model.safetensors" in told["files"]
    assert told["differences"] == []
    assert (runs / "done-again" / "adapter").is_dir()


def test_reproduce_with_other_weights_fails_and_names_them(runs: Path):
    from safetensors.torch import load_file, save_file

    file = runs / "done" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] += 1e-3
    save_file(tensors, file)
    result = ft("reproduce", runs / "done", "--quiet")
    assert result.exit_code == 5
    assert "differ" in result.output


def test_reproduce_refuses_an_unfinished_run(runs: Path):
    assert ft("reproduce", runs / "half", "--quiet").exit_code == 2
    shutil.rmtree(runs / "half-again", ignore_errors=True)

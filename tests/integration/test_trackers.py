"""A run with trackers equals the run without them, whatever the trackers do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from tests.fixtures.recipes import write_recipe
from tests.fixtures.trackers import Fakes


def train(sections: dict[str, Any], folder: Path, *options: str) -> tuple[int, str]:
    folder.mkdir()
    recipe = write_recipe(sections, folder)
    result = CliRunner().invoke(app, ["train", str(recipe), "--quiet", "--run-dir", str(folder / "run"), *options])
    assert "Traceback" not in result.output
    return result.exit_code, result.stderr


def left_by(run: Path) -> tuple[bytes, list[tuple[str, int, float]]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["event"], line["step"], line["loss"]) for line in lines]
    return (run / "adapter" / "adapter_model.safetensors").read_bytes(), losses


@pytest.mark.parametrize("how", ["nothing at all", "raises in init", "raises in log", "exits in finish"])
def test_run_with_trackers_equals_the_run_without_bit_for_bit(
    how: str, tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert train(tiny_recipe, tmp_path / "without")[0] == 0
    fakes = Fakes(tmp_path, monkeypatch)
    fakes.misbehave(how)
    monkeypatch.setenv("WANDB_API_KEY", "c0ffee-c0ffee")
    code, said = train({**tiny_recipe, "trackers": [{"name": "wandb"}, {"name": "trackio"}]}, tmp_path / "with")
    assert code == 0
    assert left_by(tmp_path / "with" / "run") == left_by(tmp_path / "without" / "run")
    assert said.count("warning: ") == (0 if how == "nothing at all" else 2), said
    assert len(fakes.calls("init")) == 2
    texts = [file.read_text() for file in (tmp_path / "with").rglob("*") if file.suffix in (".txt", ".json", ".yaml")]
    assert "c0ffee" not in "".join([said, *texts])


def test_missing_tracker_package_is_an_error_before_the_run(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("finetune.run.trackers.process.find_spec", lambda name: None)
    code, said = train({**tiny_recipe, "trackers": [{"name": "wandb"}]}, tmp_path / "folder")
    assert code == 2
    assert "trackers.0.name: the package wandb is not installed" in said
    assert not (tmp_path / "folder" / "run").exists()


def test_run_may_resume_with_another_tracker(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fakes = Fakes(tmp_path, monkeypatch)
    assert train(tiny_recipe, tmp_path / "folder")[0] == 0
    more = ["--set", "training.max_steps=5", "--set", "trackers=[{name: mlflow}]"]
    result = CliRunner().invoke(app, ["train", "--resume", str(tmp_path / "folder" / "run"), "--quiet", *more])
    assert result.exit_code == 0, result.output
    assert [step for _, step, _ in fakes.calls("log")] == [4, 5, 5]

"""A sweep is a folder of ordinary runs; a stopped sweep ends as an uninterrupted one."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from finetune.errors import RefusedError, Stopped
from finetune.jobs.sweep import sampler
from finetune.jobs.sweep.run import Sweep
from finetune.recipe.load import load_recipe
from finetune.run.directory import RunDirectory
from finetune.run.events import Event, StepMetrics
from finetune.run.signals import Interruption
from finetune.run.sweep_trials import Trial
from tests.fixtures.recipes import write_recipe

needs_optuna = pytest.mark.skipif(sampler.find_spec("optuna") is None, reason="needs the extra sweep")

KEYS = [
    {"key": "optimizer.learning_rate", "draw": "log_uniform", "low": 1e-4, "high": 0.1},
    {"key": "adapter.r", "draw": "choice", "choices": [2, 4]},
]


def swept(recipe: dict[str, Any], folder: Path, keys: list[dict[str, Any]] = KEYS, trials: int = 4) -> Path:
    return write_recipe({**recipe, "sweep": {"trials": trials, "keys": keys}}, folder)


def ignore(event: Event) -> None:
    del event


def run_all(file: Path, folder: Path, stop_in: int | None = None) -> list[Trial]:
    """Run all trials; with `stop_in`, until a signal in the first step of that trial."""
    sweep = Sweep(load_recipe(file), folder)
    while (trial := sweep.next_trial()) is not None:
        interruption = Interruption()

        def report(event: Event, number: int = trial.number, asked: Interruption = interruption) -> None:
            if isinstance(event, StepMetrics) and number == stop_in:
                asked.number = signal.SIGTERM

        sweep.train(trial, sweep.run_of(trial), report, interruption)
    return sweep.directory.trials()


def facts(trials: list[Trial]) -> list[tuple[Any, ...]]:
    return [(trial.number, trial.values, trial.loss, trial.failure) for trial in trials]


def ft(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@needs_optuna
def test_trials_are_runs_of_their_values_and_the_first_is_the_unchanged_recipe(
    tiny_recipe: dict[str, Any], tmp_path: Path
):
    trials = run_all(swept(tiny_recipe, tmp_path), tmp_path / "sweep")
    assert trials[0].values == {"optimizer.learning_rate": 1e-2, "adapter.r": 4}
    assert len({json.dumps(trial.values) for trial in trials}) == 4
    for trial in trials:
        run = RunDirectory.open(trial.path)
        recipe = load_recipe(run.recipe).recipe
        found = {"optimizer.learning_rate": recipe.optimizer.learning_rate, "adapter.r": recipe.adapter.r}
        assert found == trial.values
        assert (recipe.sweep, recipe.run.name) == (None, trial.name)
        assert run.is_finished
        assert trial.loss is not None
    page = (tmp_path / "sweep" / "sweep.html").read_text(encoding="utf-8")
    assert "4 of 4 trials" in page
    assert f"{min(trial.loss for trial in trials):.4f}" in page


@needs_optuna
@pytest.mark.parametrize("stop_in", [1, 3])
def test_stopped_sweep_ends_as_uninterrupted(tiny_recipe: dict[str, Any], tmp_path: Path, stop_in: int):
    file = swept(tiny_recipe, tmp_path)
    with pytest.raises(Stopped) as stopped:
        run_all(file, tmp_path / "stopped", stop_in=stop_in)
    assert stopped.value.hint == "resume with the same command"
    assert facts(run_all(file, tmp_path / "stopped")) == facts(run_all(file, tmp_path / "unstopped"))


@needs_optuna
def test_sweep_continues_after_a_failing_trial(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    diverging = [{"key": "optimizer.learning_rate", "draw": "choice", "choices": [1e-2, 1e30]}]
    invalid = [{"key": "adapter.r", "draw": "choice", "choices": [4, -3]}]
    for keys, cause in ((diverging, "not finite"), (invalid, "adapter.r")):
        folder = tmp_path / cause
        good, bad = run_all(swept(tiny_recipe, tmp_path, keys), folder)
        assert good.loss is not None
        assert bad.loss is None
        assert cause in str(bad.failure)
        assert not bad.is_open


@pytest.mark.parametrize("sampler", [None, "grid", pytest.param("tpe", marks=needs_optuna)])
def test_sweep_ends_when_all_values_were_tried(
    tiny_recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, sampler: str | None
):
    caplog.set_level("INFO")
    keys = [{"key": "adapter.r", "draw": "integer", "low": 2, "high": 4, "step": 2}]
    sweep = {"trials": 9, "keys": keys, "sampler": sampler}
    trials = run_all(write_recipe({**tiny_recipe, "sweep": sweep}, tmp_path), tmp_path / "sweep")
    assert sorted(trial.values["adapter.r"] for trial in trials) == [2, 4]
    assert "every combination of values was tried: 2 trials" in caplog.text


GRID = [
    {"key": "optimizer.learning_rate", "draw": "choice", "choices": [1e-3, 1e-2, 2e-2]},
    {"key": "adapter.r", "draw": "choice", "choices": [2, 4]},
]


def proposals(file: Path, folder: Path) -> list[dict[str, Any]]:
    """The values of all trials, none of which is trained."""
    sweep, found = Sweep(load_recipe(file), folder), []
    while (trial := sweep.next_trial()) is not None:
        found.append(dict(trial.values))
        sweep.directory.fail(trial, "not trained")
    return found


@pytest.mark.parametrize(
    "sampler", [None, "grid", *(pytest.param(name, marks=needs_optuna) for name in ("tpe", "random"))]
)
def test_sweep_of_choices_proposes_each_combination_once(
    tiny_recipe: dict[str, Any], tmp_path: Path, sampler: str | None
):
    sweep = {"trials": 6, "keys": GRID, "sampler": sampler}
    found = proposals(write_recipe({**tiny_recipe, "sweep": sweep}, tmp_path), tmp_path / "sweep")
    pairs = [(values["optimizer.learning_rate"], values["adapter.r"]) for values in found]
    assert pairs[0] == (1e-2, 4)  # the recipe's own
    assert sorted(pairs) == [(rate, rank) for rate in (1e-3, 1e-2, 2e-2) for rank in (2, 4)]
    if sampler in (None, "grid"):
        assert pairs[1:] == [pair for pair in sorted(pairs) if pair != (1e-2, 4)]


def test_grid_with_fewer_trials_lists_the_combinations_that_are_left(
    tiny_recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    file = write_recipe({**tiny_recipe, "sweep": {"trials": 4, "keys": GRID, "sampler": "grid"}}, tmp_path)
    assert len(proposals(file, tmp_path / "sweep")) == 4
    assert (
        "2 combinations without a trial: optimizer.learning_rate 0.02, adapter.r 2; optimizer.learning_rate 0.02, "
        "adapter.r 4 -> raise sweep.trials to 6 for all"
    ) in caplog.text
    file = write_recipe({**tiny_recipe, "sweep": {"trials": 6, "keys": GRID, "sampler": "grid"}}, tmp_path)
    assert len(proposals(file, tmp_path / "sweep")) == 2


@needs_optuna
def test_sweep_that_an_earlier_version_began_keeps_its_sampler(tiny_recipe: dict[str, Any], tmp_path: Path):
    earlier = {"trials": 2, "keys": GRID, "sampler": "tpe"}
    assert len(proposals(write_recipe({**tiny_recipe, "sweep": earlier}, tmp_path), tmp_path / "sweep")) == 2
    file = write_recipe({**tiny_recipe, "sweep": {"trials": 6, "keys": GRID}}, tmp_path)
    assert Sweep(load_recipe(file), tmp_path / "sweep").section.chosen_sampler == "tpe"
    assert len(proposals(file, tmp_path / "sweep")) == 4


@needs_optuna
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"adapter.r": 4},
        {"optimizer.learning_rate": "1e-2", "adapter.r": 4},
        {"optimizer.learning_rate": [1e-2], "adapter.r": 4},
        {"optimizer.learning_rate": 1e-2, "adapter.r": 10**9},
        {"optimizer.learning_rate": 1e-2, "adapter.r": 4, "model.name": "other"},
    ],
)
def test_sweep_with_recorded_values_that_are_not_of_its_keys_is_refused(
    values: dict[str, Any], tiny_recipe: dict[str, Any], tmp_path: Path
):
    file, folder = swept(tiny_recipe, tmp_path), tmp_path / "sweep"
    Sweep(load_recipe(file), folder).directory.begin(values)
    with pytest.raises(RefusedError, match="trial 1 has no value of the sweep for") as refused:
        Sweep(load_recipe(file), folder)
    assert refused.value.where == str(folder / "trials.jsonl")


@needs_optuna
def test_sweep_resumes_with_more_trials_but_not_with_another_recipe(tiny_recipe: dict[str, Any], tmp_path: Path):
    folder = tmp_path / "sweep"
    first = run_all(swept(tiny_recipe, tmp_path, trials=1), folder)
    both = run_all(swept(tiny_recipe, tmp_path, trials=2), folder)
    assert facts(both)[:1] == facts(first)
    assert len(both) == 2
    other = {**tiny_recipe, "training": {**tiny_recipe["training"], "seed": 7}}
    with pytest.raises(RefusedError, match=r"training\.seed: 42 -> 7"):
        Sweep(load_recipe(swept(other, tmp_path)), folder)


@needs_optuna
def test_sweep_command_prints_trials_table_and_the_best_command(tiny_recipe: dict[str, Any], tmp_path: Path):
    file = swept(tiny_recipe, tmp_path, trials=2)
    result = ft("sweep", str(file), "--sweep-dir", str(tmp_path / "sweep"), "--quiet")
    assert result.exit_code == 0, result.stderr
    assert "trial 1 of 2: learning_rate 0.01  r 4" in result.stderr
    assert "(best)" in result.stdout
    assert f"best: ft train {file} --set optimizer.learning_rate=" in result.stdout
    again = ft("sweep", str(file), "--sweep-dir", str(tmp_path / "sweep"), "--json")
    events = [json.loads(line) for line in again.stdout.splitlines()]
    assert [event["event"] for event in events] == ["trial_done", "trial_done"]


@needs_optuna
def test_sweep_command_fails_without_any_result(tiny_recipe: dict[str, Any], tmp_path: Path):
    keys = [{"key": "adapter.r", "draw": "choice", "choices": [-3]}]
    result = ft("sweep", str(swept(tiny_recipe, tmp_path, keys, trials=1)), "--sweep-dir", str(tmp_path / "sweep"))
    assert result.exit_code == 5
    assert "no trial has a result" in result.stderr


def test_sweep_without_optuna_has_a_hint(tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampler, "find_spec", lambda name: None)
    result = ft("sweep", str(swept(tiny_recipe, tmp_path)), "--sweep-dir", str(tmp_path / "sweep"))
    assert result.exit_code == 2
    assert "pip install optuna" in result.stderr
    assert not (tmp_path / "sweep").exists()


def test_recipe_without_a_sweep_section_has_a_hint(tiny_recipe: dict[str, Any], tmp_path: Path):
    result = ft("sweep", str(write_recipe(tiny_recipe, tmp_path)))
    assert result.exit_code == 2
    assert "add a section: sweep:" in result.stderr


@needs_optuna
def test_sweep_refuses_a_folder_with_other_files(tiny_recipe: dict[str, Any], tmp_path: Path):
    result = ft("sweep", str(swept(tiny_recipe, tmp_path)), "--sweep-dir", str(tmp_path))
    assert result.exit_code == 6
    assert "holds no sweep" in result.stderr

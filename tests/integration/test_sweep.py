"""A sweep is a folder of ordinary runs; a stopped sweep ends as an uninterrupted one."""

from __future__ import annotations

import json
import math
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from finetune.errors import RecipeError, RefusedError, Stopped
from finetune.jobs.sweep import sampler
from finetune.jobs.sweep.goal import Goal
from finetune.jobs.sweep.run import Sweep
from finetune.recipe.load import load_recipe
from finetune.run.directory import RunDirectory
from finetune.run.events import Event, StepMetrics
from finetune.run.history import History
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
    while (following := sweep.next_run()) is not None:
        trial, run = following
        interruption = Interruption()

        def report(event: Event, number: int = trial.number, asked: Interruption = interruption) -> None:
            if isinstance(event, StepMetrics) and number == stop_in:
                asked.number = signal.SIGTERM

        sweep.train(trial, run, report, interruption)
    return sweep.directory.trials()


def facts(trials: list[Trial]) -> list[tuple[Any, ...]]:
    return [
        (trial.number, trial.values, [(run.loss, run.score) for run in trial.runs], trial.failure) for trial in trials
    ]


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
        run = RunDirectory.open(trial.runs[0].path)
        recipe = load_recipe(run.recipe).recipe
        found = {"optimizer.learning_rate": recipe.optimizer.learning_rate, "adapter.r": recipe.adapter.r}
        assert found == trial.values
        assert (recipe.sweep, recipe.run.name) == (None, trial.runs[0].name)
        assert run.is_finished
        assert trial.loss is not None
    page = (tmp_path / "sweep" / "sweep.html").read_text(encoding="utf-8")
    assert "4 of 4 trials" in page
    assert f"{min(trial.loss for trial in trials):.4f}" in page


@needs_optuna
@pytest.mark.parametrize("stop_in", [1, pytest.param(3, marks=pytest.mark.slow)])
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
        assert bad.open_run is None


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
    while (following := sweep.next_run()) is not None:
        trial, _ = following
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


def with_goal(recipe: dict[str, Any], goal: str | None, repeats: int = 1) -> dict[str, Any]:
    keys = [{"key": "adapter.r", "draw": "choice", "choices": [2, 4]}]
    task = {"name": "copy", "kind": "loss", "data": dict(recipe["data"]["train"][0])}
    evaluation = {**recipe.get("evaluation", {}), "generation_rows": 2, "max_new_tokens": 4, "tasks": [task]}
    return {**recipe, "evaluation": evaluation, "sweep": {"goal": goal, "repeats": repeats, "keys": keys}}


def test_trials_are_compared_by_the_metric_that_ft_eval_measures(tiny_recipe: dict[str, Any], tmp_path: Path):
    file = write_recipe(with_goal(tiny_recipe, "copy/perplexity"), tmp_path)
    trials = run_all(file, tmp_path / "sweep")
    for trial in trials:
        run = RunDirectory.open(trial.runs[0].path)
        results = json.loads((run.evaluation / "results.json").read_text())
        assert trial.scores is not None
        assert trial.scores.mean == results["tasks"]["copy"]["perplexity"]["value"]
    result = ft("sweep", str(file), "--sweep-dir", str(tmp_path / "sweep"))
    assert "copy/perplexity" in result.stdout
    assert trials == run_all(file, tmp_path / "sweep")  # nothing is trained or evaluated again


def test_sweep_killed_between_training_and_evaluation_measures_the_finished_run(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file, folder = write_recipe(with_goal(tiny_recipe, "copy/loss"), tmp_path), tmp_path / "sweep"
    with monkeypatch.context() as patched:
        patched.setattr(Goal, "measure", lambda *arguments: sys.exit(1))
        with pytest.raises(SystemExit):
            run_all(file, folder)
    finished = (folder / "trial-001" / "metrics.jsonl").read_bytes()
    assert facts(run_all(file, folder)) == facts(run_all(file, tmp_path / "other"))
    assert (folder / "trial-001" / "metrics.jsonl").read_bytes() == finished


def test_trial_without_a_finite_goal_fails_and_the_next_one_trains(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Goal, "measure", lambda self, run, on_event: math.nan if "001" in run.path.name else 0.5)
    first, second = run_all(write_recipe(with_goal(tiny_recipe, "copy/loss"), tmp_path), tmp_path / "sweep")
    assert first.failure == "trial-001 has no finite copy/loss"
    assert second.scores is not None


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ("copy/accuracy", "copy/accuracy is not measured (name one of validation/loss"),
        ("validation/rouge_l", "validation/rouge_l is not measured"),
        ("lost/loss", "lost/loss is not measured"),
        ("loss", "loss is measured by several tasks (name one of validation/loss, copy/loss)"),
    ],
)
def test_goal_that_no_task_or_several_tasks_measure_is_refused_at_its_line(
    tiny_recipe: dict[str, Any], tmp_path: Path, goal: str, message: str
):
    file = write_recipe(with_goal(tiny_recipe, goal), tmp_path)
    assert ft("validate", str(file)).exit_code == 2
    result = ft("sweep", str(file), "--sweep-dir", str(tmp_path / "sweep"))
    assert result.exit_code == 2
    assert message.partition(" (")[0] in result.stderr
    assert message.partition("(")[2].rstrip(")") in result.stderr
    assert re.search(r"\.yaml:\d+:\d+: sweep\.goal", result.stderr)
    assert not (tmp_path / "sweep").exists()


def test_metric_alone_is_the_goal_if_one_task_measures_it(tiny_recipe: dict[str, Any], tmp_path: Path):
    for goal, found in (("f1", "validation/f1"), ("held_out/loss", "validation/loss"), (None, "None")):
        recipe = load_recipe(write_recipe(with_goal(tiny_recipe, goal), tmp_path)).recipe
        assert str(Goal.of(recipe)) == found


def test_repeats_train_with_other_seeds_on_the_same_rows(tiny_recipe: dict[str, Any], tmp_path: Path):
    recipe = with_goal(tiny_recipe, None, repeats=3)
    [train] = recipe["data"]["train"]
    recipe["data"] = {**recipe["data"], "train": [{**train, "rows": 6}], "validation_fraction": 0.5}
    recipe["evaluation"]["tasks"] = []
    trials = run_all(write_recipe(recipe, tmp_path), tmp_path / "sweep")
    for trial in trials:
        recipes = [load_recipe(RunDirectory.open(run.path).recipe).recipe for run in trial.runs]
        assert [each.training.seed for each in recipes] == [42, 43, 44]
        assert {each.sample_seed for each in recipes} == {42}
        assert {each.adapter.r for each in recipes} == {trial.values["adapter.r"]}
        losses = [run.loss for run in trial.runs]
        assert len(set(losses)) == 3
        # Before the first step all seeds have the loss of the base: they validate the same rows.
        before = {History.of(RunDirectory(run.path)).validations[0].loss for run in trial.runs}
        assert len(before) == 1
        assert trial.scores is not None
        assert trial.scores.low is not None


@pytest.mark.slow
def test_repeats_may_be_raised_when_a_sweep_resumes(tiny_recipe: dict[str, Any], tmp_path: Path):
    once = run_all(write_recipe(with_goal(tiny_recipe, None), tmp_path), tmp_path / "sweep")
    twice = run_all(write_recipe(with_goal(tiny_recipe, None, repeats=2), tmp_path), tmp_path / "sweep")
    assert [trial.runs[0] for trial in twice] == [trial.runs[0] for trial in once]
    whole = run_all(write_recipe(with_goal(tiny_recipe, None, repeats=2), tmp_path), tmp_path / "whole")
    assert facts(twice) == facts(whole)


@pytest.mark.slow
def test_stopped_sweep_with_repeats_and_a_goal_ends_as_uninterrupted(tiny_recipe: dict[str, Any], tmp_path: Path):
    file = write_recipe(with_goal(tiny_recipe, "copy/loss", repeats=2), tmp_path)
    with pytest.raises(Stopped):
        run_all(file, tmp_path / "stopped", stop_in=2)
    assert facts(run_all(file, tmp_path / "stopped")) == facts(run_all(file, tmp_path / "unstopped"))


def test_repeats_of_swept_seeds_are_refused(tiny_recipe: dict[str, Any], tmp_path: Path):
    keys = [{"key": "training.seed", "draw": "choice", "choices": [1, 2]}]
    recipe = {**tiny_recipe, "sweep": {"repeats": 2, "keys": keys}}
    with pytest.raises(RecipeError, match=r"training\.seed, which is swept too"):
        load_recipe(write_recipe(recipe, tmp_path))


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

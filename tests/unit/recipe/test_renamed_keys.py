"""Earlier spellings of keys are accepted with a note, and never change what a recipe means."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from finetune.recipe import load as load_module
from finetune.recipe.diff import changes
from finetune.recipe.explain import explain_key
from finetune.recipe.load import dump_recipe, json_schema, load_recipe
from finetune.recipe.renamed_keys import RENAMED_KEYS, renamed_settings
from finetune.recipe.schema import every_key
from finetune.recipe.yaml.document import dotted
from finetune.run.directory import RunDirectory
from finetune.run.evaluation_results import read_results
from tests.fixtures.make_golden_run import FOLDER

from .conftest import Load, Problems

SWEEP = """\
sweep:
  keys:
    - {key: data.on_untrainable, draw: choice, choices: [stop, skip]}
    - {key: training.rehearsal, draw: choice, choices: [true, false]}
"""


@pytest.fixture(autouse=True)
def _fresh_warnings(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Each note is logged once in a process."""
    load_module._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        yield


@pytest.fixture
def old(good: str) -> str:
    """The good recipe with both earlier spellings; `on_untrainable` is on line 10."""
    return good.replace("data:\n", "data:\n  on_untrainable: skip\n").replace(
        "training:\n", "training:\n  rehearsal: false\n"
    )


def test_renamed_keys_lead_from_no_key_of_the_schema_to_one():
    keys = {dotted(path) for path in every_key()}
    assert all(key.new in keys and key.old not in keys for key in RENAMED_KEYS)
    assert all(key.old.rpartition(".")[0] == key.new.rpartition(".")[0] for key in RENAMED_KEYS)


def test_recipe_with_earlier_spellings_loads_as_the_new_one(old: str, good: str, load: Load):
    recipe = load(old).recipe
    assert (recipe.data.on_bad_row, recipe.training.dry_run) == ("drop", False)
    assert recipe == load(good, "data.on_bad_row=drop", "training.dry_run=false").recipe
    assert load(good.replace("data:\n", "data:\n  on_untrainable: stop\n")).recipe.data.on_bad_row == "error"


def test_note_gives_place_earlier_and_new_spelling(
    old: str, load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    load(old)
    file = tmp_path / "recipe.yaml"
    assert caplog.messages == [
        f"{file}:10:3: `data.on_untrainable` is an earlier spelling; write `data.on_bad_row: drop`",
        f"{file}:19:3: `training.rehearsal` is an earlier spelling; write `training.dry_run: false`",
    ]
    load(old)
    assert len(caplog.messages) == 2


def test_new_spelling_has_no_note(good: str, load: Load, caplog: pytest.LogCaptureFixture):
    load(good, "data.on_bad_row=drop", "training.dry_run=true")
    assert not caplog.messages


def test_earlier_value_of_the_new_key_is_accepted(good: str, load: Load, caplog: pytest.LogCaptureFixture):
    assert load(good, "data.on_bad_row=skip").recipe.data.on_bad_row == "drop"
    assert "write `data.on_bad_row: drop`" in caplog.text


@pytest.mark.parametrize("override", ["data.on_untrainable=stop", "data.on_bad_row=error"])
def test_override_replaces_the_file_in_either_spelling(override: str, old: str, load: Load):
    assert load(old, override).recipe.data.on_bad_row == "error"


def test_last_override_wins_in_either_spelling(good: str, load: Load, caplog: pytest.LogCaptureFixture):
    assert load(good, "training.dry_run=true", "training.rehearsal=false").recipe.training.dry_run is False
    assert load(good, "training.rehearsal=false", "training.dry_run=true").recipe.training.dry_run is True
    assert caplog.messages == [
        "--set training.rehearsal: `training.rehearsal` is an earlier spelling; write `training.dry_run: false`"
    ]


def test_both_spellings_in_a_file_are_a_problem_at_the_earlier_one(old: str, problems: Problems, tmp_path: Path):
    (problem,) = problems(old.replace("data:\n", "data:\n  on_bad_row: error\n"))
    assert problem.where == f"{tmp_path / 'recipe.yaml'}:11:3"
    assert problem.key == "data.on_untrainable"
    assert "data.on_bad_row" in problem.what


def test_both_spellings_in_one_override_are_a_problem(good: str, problems: Problems):
    (problem,) = problems(good, "training={rehearsal: true, dry_run: false}")
    assert (problem.where, problem.key) == ("--set training", "training.rehearsal")


def test_wrong_value_is_a_problem_at_its_place_in_the_file(old: str, problems: Problems, tmp_path: Path):
    (problem,) = problems(old.replace("on_untrainable: skip", "on_untrainable: ignore"))
    assert problem.where == f"{tmp_path / 'recipe.yaml'}:10:19"
    assert "one of error, drop" in problem.what


@pytest.mark.parametrize("section", ["[1]", "text", "null", "{on_untrainable: }", "{on_untrainable: {a: 1}}"])
def test_unusable_section_is_refused_and_not_an_error_of_the_renaming(section: str, problems: Problems):
    assert problems(f"model: {{name: a/b}}\nadapter: {{method: lora}}\ndata: {section}\n")


def test_swept_keys_and_choices_take_the_new_spelling(
    good: str, load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    sweep = load(good + SWEEP).recipe.sweep
    assert sweep is not None
    assert [swept.key for swept in sweep.keys] == ["data.on_bad_row", "training.dry_run"]
    assert [swept.model_dump()["choices"] for swept in sweep.keys] == [["error", "drop"], [True, False]]
    assert f"{tmp_path / 'recipe.yaml'}:25:13: `data.on_untrainable`" in caplog.text


def test_values_of_recorded_trials_take_the_new_spelling():
    found = renamed_settings({"data.on_untrainable": "skip", "training.rehearsal": True, "adapter.r": 8})
    assert found == {"data.on_bad_row": "drop", "training.dry_run": True, "adapter.r": 8}


def test_dump_and_json_schema_have_the_new_spelling_only(old: str, load: Load):
    text = dump_recipe(load(old).recipe)
    assert "  on_bad_row: drop\n" in text
    assert "  dry_run: false\n" in text
    assert "on_untrainable" not in text + str(json_schema())
    assert "rehearsal" not in text + str(json_schema())


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("recipe.resolved.yaml")), ids=lambda file: file.parent.name)
def test_resolved_recipe_of_the_golden_run_loads_unchanged_and_without_a_note(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    assert "on_untrainable: stop" in file.read_text(encoding="utf-8")
    before = load_recipe(file).recipe
    assert (before.data.on_bad_row, before.training.dry_run) == ("error", "auto")
    assert not caplog.messages
    again = tmp_path / "recipe.yaml"
    again.write_text(dump_recipe(before), encoding="utf-8")
    assert changes(before, load_recipe(again).recipe) == []


def test_override_of_a_resolved_recipe_has_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    recipe = load_recipe(FOLDER / "stopped" / "recipe.resolved.yaml", ["training.rehearsal=false"]).recipe
    assert recipe.training.dry_run is False
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("name", ["on_untrainable", "data.on_untrainable", "on_bad_row"])
def test_explain_accepts_earlier_names(name: str):
    (explanation,) = explain_key(name)
    assert (explanation.key, explanation.earlier) == ("data.on_bad_row", ("data.on_untrainable",))


def test_validate_shows_the_note_once_on_standard_error(old: str, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(old, encoding="utf-8")
    result = CliRunner().invoke(app, ["validate", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 0
    assert result.stderr.count("warning: ") == 2
    assert "recipe.yaml:10:3: `data.on_untrainable`" in result.stderr
    assert "earlier" not in result.stdout


def test_task_named_validation_is_renamed_in_a_recorded_recipe_and_refused_in_a_users(
    good: str, tmp_path: Path, problems: Problems
):
    task = "\nevaluation: {tasks: [{name: validation, kind: loss, data: {path: rows.jsonl}}]}\n"
    text = good[: good.index("evaluation:")] + task if "evaluation:" in good else good + task
    recorded = tmp_path / "recipe.resolved.yaml"
    recorded.write_text(text, encoding="utf-8")
    assert [each.name for each in load_recipe(recorded).recipe.evaluation.tasks] == ["validation_task"]
    (problem,) = problems(text)
    assert problem.key == "evaluation.tasks.0.name"


def test_results_of_a_task_named_validation_stay_apart_from_the_validation_rows(tmp_path: Path):
    run = RunDirectory(tmp_path)
    run.evaluation.mkdir()
    ours, theirs = ({"loss": {"value": value}} for value in (1.0, 2.0))
    (run.evaluation / "results.json").write_text(json.dumps({"tasks": {"held_out": ours, "validation": theirs}}))
    assert read_results(run)["tasks"] == {"validation": ours, "validation_task": theirs}

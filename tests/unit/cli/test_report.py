"""`ft report` and `ft watch`: from a run's files, whatever it has come to, without anything heavy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from finetune.run.directory import RunDirectory
from tests.fixtures.runs import steps, written_run


def ft(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return written_run(tmp_path / "run")


def test_the_page_of_a_run_is_made_anew_in_its_directory(run: RunDirectory):
    run.report.write_text("old")
    result = ft("report", run.path)
    assert (result.exit_code, result.stdout) == (0, f"page: {run.report}\n")
    assert run.report.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_several_runs_need_a_file_and_no_file_is_replaced_unasked(run: RunDirectory, tmp_path: Path):
    refused = ft("report", run.path, run.path)
    assert refused.exit_code == 2
    assert "add --output" in refused.stderr
    page = tmp_path / "both.html"
    first = ft("report", run.path, run.path, "--output", page, "--json")
    assert json.loads(first.stdout) == {"event": "page", "file": str(page)}
    assert ft("report", run.path, run.path, "--output", page).exit_code == 6
    assert ft("report", run.path, run.path, "--output", page, "--overwrite").exit_code == 0


def test_a_run_whose_recipe_is_damaged_is_told_so(run: RunDirectory):
    run.recipe.write_text("adapter: [")
    result = ft("report", run.path)
    assert result.exit_code == 2
    assert "recipe.resolved.yaml:" in result.stderr


def test_a_finished_run_is_watched_to_its_end_at_once(run: RunDirectory):
    result = ft("watch", run.path)
    assert result.exit_code == 0
    assert "step 3/3  loss 1.0000" in result.stderr
    assert "warning: step 3: words\n  -> words" in result.stderr
    assert result.stdout.startswith("finished after step 3\n")


def test_a_run_whose_process_was_killed_is_told_by_what_it_left(tmp_path: Path):
    run = written_run(tmp_path / "run", course=steps([2.0, 1.5], total=9))
    run.outcome.unlink()
    assert ft("watch", run.path).stdout == "failed after step 2\n"
    (run.checkpoints / "step-00000001").mkdir(parents=True)
    assert f"resume it: ft train --resume {run.path}" in ft("watch", run.path).stdout


def test_watching_tells_programs_every_event(run: RunDirectory):
    events = [json.loads(line)["event"] for line in ft("watch", run.path, "--json").stdout.splitlines()]
    assert events == ["validation", "ranks", "step", "step", "step", "sample", "warning", "validation", "watched"]

"""`ft report` and `ft watch`: from the files of a run in any state, without torch."""

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


def test_report_replaces_the_page_in_the_run_directory(run: RunDirectory):
    run.report.write_text("old")
    result = ft("report", run.path)
    assert (result.exit_code, result.stdout) == (0, f"page: {run.report}\n")
    assert run.report.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_report_of_several_runs_needs_output_and_replaces_files_only_with_overwrite(run: RunDirectory, tmp_path: Path):
    refused = ft("report", run.path, run.path)
    assert refused.exit_code == 2
    assert "add --output" in refused.stderr
    page = tmp_path / "both.html"
    first = ft("report", run.path, run.path, "--output", page, "--json")
    assert json.loads(first.stdout) == {"event": "page", "file": str(page)}
    assert ft("report", run.path, run.path, "--output", page).exit_code == 6
    assert ft("report", run.path, run.path, "--output", page, "--overwrite").exit_code == 0


def test_report_of_a_damaged_recipe_exits_with_2(run: RunDirectory):
    run.recipe.write_text("adapter: [")
    result = ft("report", run.path)
    assert result.exit_code == 2
    assert "recipe.resolved.yaml:" in result.stderr


def test_watch_of_a_finished_run_ends_immediately(run: RunDirectory):
    result = ft("watch", run.path)
    assert result.exit_code == 0
    assert "step 3/3  loss 1.0000" in result.stderr
    assert "warning: step 3: words\n  -> words" in result.stderr
    assert result.stdout.startswith("finished after step 3\n")


def test_watch_of_a_killed_run_shows_how_to_resume_it(tmp_path: Path):
    run = written_run(tmp_path / "run", course=steps([2.0, 1.5], total=9))
    run.outcome.unlink()
    assert ft("watch", run.path).stdout == "failed after step 2\n"
    (run.checkpoints / "step-00000001").mkdir(parents=True)
    assert f"resume: ft train --resume {run.path}" in ft("watch", run.path).stdout


def test_watch_with_json_prints_every_event(run: RunDirectory):
    events = [json.loads(line)["event"] for line in ft("watch", run.path, "--json").stdout.splitlines()]
    assert events == ["validation", "ranks", "step", "step", "step", "sample", "warning", "validation", "watched"]

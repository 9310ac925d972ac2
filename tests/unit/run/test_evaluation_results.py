"""Results of `ft eval` in run directories of this and of earlier versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.run.directory import RunDirectory
from finetune.run.evaluation_results import read_results
from finetune.storage.files import write_json


@pytest.mark.parametrize("name", ["validation", "held_out"])
def test_results_of_any_version_have_the_current_name_of_the_validation_task(name: str, tmp_path: Path):
    run = RunDirectory(tmp_path)
    run.evaluation.mkdir()
    scores = {"loss": {"value": 1.5}}
    write_json(run.evaluation / "results.json", {"against": None, "tasks": {name: scores, "mine": {}}})
    assert read_results(run) == {"against": None, "tasks": {"validation": scores, "mine": {}}}


def test_results_of_a_run_without_evaluation_are_empty(tmp_path: Path):
    assert read_results(RunDirectory(tmp_path)) == {}

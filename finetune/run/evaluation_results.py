"""`results.json` of a run, as `ft eval` of this or an earlier version wrote it."""

from __future__ import annotations

from typing import Any

from finetune.recipe.sections.evaluation import RENAMED_TASK, VALIDATION, current_task_name
from finetune.run.directory import RunDirectory
from finetune.storage.files import json_object


def read_results(run: RunDirectory) -> dict[str, Any]:
    """The results, with today's task names; empty where the run was not evaluated."""
    results = json_object(run.evaluation / "results.json")
    if "tasks" not in results:
        return results
    tasks = dict(results["tasks"])
    if "held_out" in tasks and VALIDATION in tasks:  # version 0.1 left the name to tasks of the recipe
        tasks[RENAMED_TASK] = tasks.pop(VALIDATION)
    return {**results, "tasks": {current_task_name(name): scores for name, scores in tasks.items()}}

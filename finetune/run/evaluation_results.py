"""`results.json` and `generations.jsonl` of a run, as `ft eval` of this or an earlier version wrote them."""

from __future__ import annotations

from typing import Required

from typing_extensions import TypedDict

from finetune.recipe.sections.evaluation import RENAMED_TASK, VALIDATION, current_task_name
from finetune.run.directory import RunDirectory
from finetune.run.history import records
from finetune.storage.records import Count, Number, read_record, well_formed, with_other_keys


@with_other_keys
class OtherScore(TypedDict, total=False):
    """The score of the model that was compared with."""

    value: Number | None


@with_other_keys
class RecordedScore(OtherScore, total=False):
    """A score and its confidence interval; None where it is not finite."""

    low: Number | None
    high: Number | None
    rows: Count | None
    unit: str
    against: OtherScore


_Earlier = TypedDict("_Earlier", {"answers_by": str}, total=False)  # noqa: UP013
"""Keys of earlier versions."""


@with_other_keys
class RecordedClass(TypedDict, total=False):
    """The figures of a label; None where they are undefined."""

    label: Required[str]
    precision: Number | None
    recall: Number | None
    f1: Number | None
    support: Required[Count]
    predicted: Required[Count]
    outside: Count


@with_other_keys
class OtherClasses(TypedDict, total=False):
    """The labels of a task: a table, and how often each reference (outer key) was answered with each label."""

    rows: Count
    outside: Count
    per_class: list[RecordedClass]
    confusion: dict[str, dict[str, Count]]


@with_other_keys
class RecordedClasses(OtherClasses, total=False):
    """The same, with the answers of the model that was compared with."""

    against: OtherClasses


@with_other_keys
class Results(_Earlier, total=False):
    """The content of `results.json`."""

    model: str
    against: str | None
    generation_backend: str
    tasks: dict[str, dict[str, RecordedScore]]
    classes: dict[str, RecordedClasses]


@with_other_keys
class OtherAnswer(TypedDict, total=False):
    """The answer of the model that was compared with."""

    answer: str


@with_other_keys
class Answer(OtherAnswer, total=False):
    """A line of `generations.jsonl`."""

    prompt: str
    references: list[str]
    against: OtherAnswer


def read_results(run: RunDirectory) -> Results:
    """The results, with today's task names; empty where the run was not evaluated."""
    results = read_record(run.evaluation / "results.json", Results)
    if "tasks" in results:
        tasks = dict(results["tasks"])
        if "held_out" in tasks and VALIDATION in tasks:  # version 0.1 left the name to tasks of the recipe
            tasks[RENAMED_TASK] = tasks.pop(VALIDATION)
        results["tasks"] = {current_task_name(name): scores for name, scores in tasks.items()}
    return results


def read_answers(run: RunDirectory) -> list[Answer]:
    """The answers to the rows that were evaluated; empty where there were none."""
    return [well_formed(line, Answer) for line in records(run.evaluation / "generations.jsonl")]

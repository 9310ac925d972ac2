"""Rules on validation during training, early stopping and the tasks of `ft eval`."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.recipe.recipe import Recipe
from finetune.recipe.rules.data import task_sources, with_unused_option, without_one_location
from finetune.recipe.rules.violation import Violation, first
from finetune.recipe.sections.data import SourceSection
from finetune.recipe.sections.evaluation import EARLIER_TASK_NAMES, VALIDATION, RowsTask, TaskSection


def evaluation_needs_validation_rows(recipe: Recipe) -> Violation | None:
    """The validation loss and samples need validation rows."""
    has_validation = recipe.data.validation or recipe.data.validation_fraction
    for key in ("every_steps", "sample_rows"):
        if getattr(recipe.evaluation, key) and not has_validation:
            return Violation(
                f"evaluation.{key}",
                "there are no validation rows to evaluate on",
                "name files in data.validation, or set data.validation_fraction to 0.05",
            )
    return None


def early_stopping_needs_evaluations(recipe: Recipe) -> Violation | None:
    """Early stopping compares validation losses of several steps."""
    if recipe.evaluation.patience and not recipe.evaluation.every_steps:
        return Violation(
            "evaluation.patience",
            "the validation loss is computed at the end only, and early stopping needs it during training",
            "set evaluation.every_steps too, such as to 50",
        )
    return None


def early_stopping_needs_usable_steps(recipe: Recipe) -> Violation | None:
    """A method whose schedule spans all steps has a usable adapter at the last step only."""
    if recipe.evaluation.patience and not recipe.adapter.can_be_extended:
        return Violation(
            "evaluation.patience",
            f"{recipe.adapter.method} prunes ranks by a schedule over all steps: stopping early would cut it off",
            "leave evaluation.patience out",
        )
    return None


def task_names_are_unique(recipe: Recipe) -> Violation | None:
    """Results and gates identify tasks by name."""
    return _taken_name(recipe.evaluation.tasks)


def tasks_have_one_source(recipe: Recipe) -> Violation | None:
    """A weight is relative to other sources, and a task has none."""
    return first(_weighted(key, source) for key, source in task_sources(recipe.evaluation.tasks))


def tasks_have_rows(recipe: Recipe) -> Violation | None:
    """A task without a source measures the validation rows."""
    if recipe.data.validation or recipe.data.validation_fraction:
        return None
    return _without_rows(recipe.evaluation.tasks, "the recipe has no validation rows", "or set data.validation")


def broken_tasks(tasks: Sequence[TaskSection]) -> Violation | None:
    """The first problem in the tasks of a file of tasks."""
    checks = (without_one_location, with_unused_option, _weighted)
    found = first(check(key, source) for key, source in task_sources(tasks) for check in checks)
    hint = "or move the task into a recipe"
    return _taken_name(tasks) or _without_rows(tasks, "a file of tasks has no validation rows", hint) or found


def _without_rows(tasks: Sequence[TaskSection], why: str, hint: str) -> Violation | None:
    for index, task in enumerate(tasks):
        if isinstance(task, RowsTask) and task.data is None:
            what = f"the task {task.name} has no source, and {why}"
            return Violation(f"evaluation.tasks.{index}", what, f"add data: {{path: rows.jsonl}}, {hint}")
    return None


def _weighted(key: str, source: SourceSection) -> Violation | None:
    if source.weight is None:
        return None
    return Violation(f"{key}.weight", "a task has one source, so a weight has no effect", "leave weight out")


def _taken_name(tasks: Sequence[TaskSection]) -> Violation | None:
    reserved = [VALIDATION, *EARLIER_TASK_NAMES]
    names = [*reserved, *(task.name for task in tasks)]
    for index, task in enumerate(tasks):
        if task.name in names[: len(reserved) + index]:
            what = "the validation rows have this name" if task.name in reserved else "another task has this name"
            return Violation(f"evaluation.tasks.{index}.name", what, "choose another")
    return None

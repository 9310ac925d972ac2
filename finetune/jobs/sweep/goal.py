"""The goal of a sweep: a metric of `ft eval` that is measured after each run."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.errors import UnsupportedError, UsageError
from finetune.evaluation.tasks import validation_metrics
from finetune.jobs.infer.evaluate import EvaluationOptions, evaluate
from finetune.jobs.load.model_ref import resolve_model_refs
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.evaluation import VALIDATION, current_task_name
from finetune.resolve import build
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler

KEY = "sweep.goal"


@dataclass(frozen=True)
class Goal:
    """A metric of a task of the recipe.

    Attributes:
        task: Name of the task.
        metric: Name of the metric.
    """

    task: str
    metric: str

    def __str__(self) -> str:
        return f"{self.task}/{self.metric}"

    @classmethod
    def of(cls, recipe: Recipe) -> Goal | None:
        """The goal of a recipe with a section `sweep`; None for the validation loss of the run.

        Raises:
            UsageError: No task measures it, or a metric without a task is one of several tasks.
        """
        assert recipe.sweep is not None
        if recipe.sweep.goal is None:
            return None
        task, slash, metric = recipe.sweep.goal.rpartition("/")
        measured = _measured(recipe)
        wanted = cls(current_task_name(task), metric)
        # Tasks of the harness name their metrics after the measurement only.
        if slash and (wanted in measured or wanted.task in _harness_tasks(recipe)):
            return wanted
        found = [goal for goal in measured if not slash and goal.metric == metric]
        if len(found) == 1:
            return found[0]
        names = ", ".join(map(str, found or measured))
        raise UsageError(
            f"{metric} is measured by several tasks" if found else f"{recipe.sweep.goal} is not measured",
            where=KEY,
            hint=f"name one of {names}" if names else "add a task to evaluation.tasks, or rows to data.validation",
        )

    def measure(self, run: RunDirectory, on_event: EventHandler) -> float:
        """Evaluate a finished run as `ft eval` does; its results are in the run.

        Raises:
            UnsupportedError: The task does not measure the metric, or its value is not finite.
            FinetuneError: The run cannot be evaluated.
        """
        [model] = resolve_model_refs([str(run.path)])
        scores = evaluate(model, EvaluationOptions(tasks=(self.task,)), on_event=on_event).scores[self.task]
        if self.metric not in scores:
            raise UnsupportedError(
                f"{self.task} does not measure {self.metric}", where=KEY, hint=f"measured: {', '.join(scores)}"
            )
        return scores[self.metric].ours.value


def _measured(recipe: Recipe) -> list[Goal]:
    """All metrics of the recipe's tasks that are known before a measurement."""
    has_validation = recipe.data.validation or recipe.data.validation_fraction
    found = [Goal(VALIDATION, metric) for metric in validation_metrics(recipe.evaluation) if has_validation]
    for section in recipe.evaluation.tasks:
        found += [Goal(section.name, metric) for metric in build(section).metrics or ()]
    return found


def _harness_tasks(recipe: Recipe) -> list[str]:
    return [section.name for section in recipe.evaluation.tasks if build(section).metrics is None]

"""Tasks of lm-evaluation-harness, by name. The package is optional: it is imported when a task is created."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from finetune.errors import EnvironmentFault, UsageError
from finetune.evaluation.engine import Engine
from finetune.evaluation.measurement import Column, Measurement
from finetune.evaluation.metrics import Metric, MetricUnit, mean
from finetune.evaluation.tasks import Task
from finetune.recipe.sections.evaluation import HarnessTask
from finetune.run.events import EventHandler, Phase


class Harness(Task):
    """A task or a group of tasks of lm-evaluation-harness.

    Args:
        section: Its section.

    Raises:
        UsageError: The harness is not installed, or has no such task.
    """

    metrics = None

    def __init__(self, section: HarnessTask) -> None:
        self.section = section
        self.name = section.name
        try:
            from lm_eval.tasks import TaskManager
        except ModuleNotFoundError as error:
            raise UsageError(
                "this is neither a task of the recipe nor a file of tasks, and for the tasks of lm-evaluation-harness "
                f"the package {error.name} is missing",
                where=self.name,
                hint="correct the name, or install it: pip install 'ft-recipes[eval]'",
            ) from error
        _quiet()
        self._manager = TaskManager()
        if self.name not in self._manager.all_tasks:
            known = sorted(name for name in self._manager.all_tasks if name.startswith(self.name[:3]))
            raise UsageError(
                "this is neither a task of the recipe, nor a file of tasks, nor a task of lm-evaluation-harness",
                where=self.name,
                hint=f"did you mean {', '.join(known[:5])}?" if known else "its tasks: lm-eval ls tasks",
            )

    def measure(self, engine: Engine, limit: int | None, on_event: EventHandler) -> Measurement:
        """See the base class.

        Raises:
            EnvironmentFault: The task's data set cannot be fetched.
            UnsupportedError: It needs a way of sampling that ft lacks.
        """
        from lm_eval.evaluator import evaluate as harness_evaluate

        from finetune.evaluation.harness_model import InMemory

        chat_template = self.section.chat_template
        on_event(Phase(f"reading the data of {self.name}"))
        try:
            tasks = self._manager.load([self.name])
            _prepare(tasks["tasks"].values(), self.section.shots)
            found = harness_evaluate(
                lm=InMemory(engine, self.on_progress(engine, "requests", on_event)),
                task_dict=tasks,
                limit=limit,
                apply_chat_template=engine.uses_chat_template if chat_template is None else chat_template,
                fewshot_as_multiturn=True,
                bootstrap_iters=0,  # intervals are computed here, from the scores of the rows
            )
        except OSError as error:  # no network, or no such data set any more
            raise EnvironmentFault(
                f"the data of the task cannot be read: {str(error).splitlines()[0]}",
                where=self.name,
                hint="fetch it once with a network: the cache of data sets keeps it",
            ) from error
        return _measurement(self.name, found)


def _prepare(tasks: Iterable[Any], shots: int | None) -> None:
    """Set examples and seeds as `lm-eval run` does, so that scores are the same."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    # Some tasks sample with the global generators.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    for task in tasks:
        own = task.get_config("num_fewshot")
        if own is None or (shots is not None and own != 0):  # a task with 0 examples stays at 0
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _measurement(name: str, found: Any) -> Measurement:
    """The results of the harness: columns for scores that are means over rows, single numbers for all others."""
    columns: list[Column] = []
    further: dict[str, float] = {}
    for task, results in {**found["results"], **found.get("groups", {})}.items():
        rows = list(_rows(task, found))
        for key, value in results.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            title = metric if filter_name == "none" else f"{metric}[{filter_name}]"
            title = title if task == name else f"{task}/{title}"
            column = _column(title, metric, filter_name, rows, value)
            if column is None:
                further[title] = float(value)
            else:
                columns.append(column)
    records = [_record(task, row) for task, rows in found["samples"].items() for row in rows]
    own_first = sorted(columns, key=lambda column: "/" in column.metric.name)
    return Measurement(tuple(own_first), tuple(records), further)


def _rows(task: str, found: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a task, or of all tasks of a group, by their locations."""
    for part in found["group_subtasks"].get(task, ()):
        yield from ((f"{part}/{where}", row) for where, row in _rows(part, found))
    yield from ((str(row["doc_id"]), row) for row in found["samples"].get(task, ()))


def _column(
    title: str, metric: str, filter_name: str, rows: Sequence[tuple[str, dict[str, Any]]], value: float
) -> Column | None:
    """The metric per row, if its mean is the result of the harness; else the harness aggregates in another way."""
    measured = [(where, row[metric]) for where, row in rows if row["filter"] == filter_name and metric in row]
    if not measured or not all(isinstance(score, int | float) for _, score in measured):
        return None
    locations, scores = [where for where, _ in measured], [float(score) for _, score in measured]
    # The result may be a median, a corpus score or a weighted mean: a bootstrap of rows would be about another number.
    if not math.isclose(fmean(scores), value, rel_tol=1e-9, abs_tol=1e-12):
        return None
    is_binary = set(scores) <= {0.0, 1.0}
    unit: MetricUnit = "share" if all(0 <= score <= 1 for score in scores) else "nats"
    return Column.of(Metric(title, mean, unit, is_binary), locations, [(score, 1) for score in scores])


def _record(task: str, row: dict[str, Any]) -> dict[str, Any]:
    arguments = row["arguments"]
    return {
        "row": f"{task}/{row['doc_id']}" + ("" if row["filter"] == "none" else f"[{row['filter']}]"),
        "prompt": str(arguments[0][0]),
        "references": [str(row["target"])],
        "answer": row["filtered_resps"],
        "scores": {metric: row[metric] for metric in row["metrics"]},
    }


def _quiet() -> None:
    """Hide log lines and progress bars of the harness: ft prints its own."""
    import datasets
    from lm_eval.api import task

    for name in ("lm_eval", "datasets", "evaluate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    # The harness has no setting for this bar.
    task.tqdm = lambda rows, **options: rows

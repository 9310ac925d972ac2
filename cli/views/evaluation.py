"""Results of `ft eval`: scores with confidence intervals, and gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from finetune.formatting import counted

from ..output import show_json, show_result
from .classes import class_tables, outside_text

if TYPE_CHECKING:
    from rich.table import Table

    from finetune.evaluation.measurement import Interval, PairedDifference
    from finetune.evaluation.metrics import MetricUnit
    from finetune.jobs.infer.evaluate_results import EvaluationResult, Score


def show_evaluation(evaluated: EvaluationResult, as_json: bool) -> None:
    """Print the scores of a model, compared with another where there is one, and the gates."""
    if as_json:
        folder = None if evaluated.folder is None else str(evaluated.folder)
        show_json({"event": "evaluated", "folder": folder, **evaluated.to_json()})
        return
    from finetune.report.run_page import answered_by

    from ..terminal import Console

    classes = evaluated.to_json()["classes"]
    for task, scores in evaluated.scores.items():
        Console().print(_scores_table(task_title(task, scores), evaluated, scores))
        if task in classes:
            Console().print(*class_tables(task, classes[task], evaluated.against, bool(evaluated.folder)), sep="\n")
            if note := outside_text(classes[task]):
                show_result(note)
    show_result(_dtypes(evaluated))
    if note := answered_by(evaluated.to_json()):
        show_result(note)
    for gate in evaluated.gates:
        sign = "met" if gate.is_met else "NOT met"
        show_result(f"gate {gate.gate}: {sign}, {gate.measured} is {gate.value:.4g}")
    if evaluated.folder:
        show_result(f"results and answers: {evaluated.folder}")


def _dtypes(evaluated: EvaluationResult) -> str:
    """The types of the computation."""
    losses, answers = evaluated.compute_dtype, evaluated.generation_dtype
    return f"computed in {losses}" + (f", answers generated in {answers}" if answers != losses else "")


def _scores_table(title: str, evaluated: EvaluationResult, scores: dict[str, Score]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    has_flips = any(score.difference and flips_text(score.difference) for score in scores.values())
    compared = ["difference"] if evaluated.against else []
    models = [evaluated.against, evaluated.label] if evaluated.against else [evaluated.label]
    differ = len({score.rows for score in scores.values() if score.rows is not None}) > 1
    table.add_column("")
    if differ:
        table.add_column("rows", justify="right")
    for column in (*models, *compared, "95 % interval", *(["better/worse"] if has_flips else [])):
        table.add_column(column, justify="right", overflow="fold")
    for name, score in scores.items():
        measured = (score.theirs, score.ours) if evaluated.against else (score.ours,)
        values = [score_text(score.unit, each.value) if each else "" for each in measured]
        change = [difference_text(score)] if evaluated.against else []
        # The interval belongs to the difference of the two models, or to the score where there is one model.
        spread = score.difference.change if score.difference else None if evaluated.against else score.ours
        flipped = [flips_text(score.difference) if score.difference else ""] if has_flips else []
        table.add_row(
            name.replace("_", " "),
            *([str(score.rows or "")] if differ else []),
            *values,
            *change,
            interval_text(score.unit, spread, bool(change)),
            *flipped,
        )
    return table


def task_title(task: str, scores: Mapping[str, Score]) -> str:
    """`validation: 48 rows`; a range where the metrics of a task have different numbers of rows."""
    counts = sorted({score.rows for score in scores.values() if score.rows is not None})
    if not counts:
        return task
    smallest = f"{counts[0]} to " if len(counts) > 1 else ""
    return f"{task}: {smallest}{counted(counts[-1], 'row')}"


def score_text(form: MetricUnit, value: float) -> str:
    """A score in its unit: `91.7 %`, `34.12`, `0.7741`."""
    match form:
        case "share":
            return f"{100 * value:.1f} %"
        case "points":
            return f"{value:.2f}"
        case "nats":
            return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def interval_text(form: MetricUnit, spread: Interval | None, is_change: bool) -> str:
    """`85.4 to 97.9 %`, with signs for a change; empty without an interval."""
    if spread is None:
        return ""
    low, high = (score_text(form, number) for number in (spread.low, spread.high))
    if is_change:
        low, high = _signed(low, spread.low), _signed(high, spread.high)
    return f"{low.removesuffix(' %')} to {high}"


def difference_text(score: Score) -> str:
    """`+12.5 %`; empty without a second model."""
    if score.theirs is None:
        return ""
    change = score.ours.value - score.theirs.value
    return _signed(score_text(score.unit, change), change)


def flips_text(difference: PairedDifference) -> str:
    """`+3 -1`: rows that became correct and rows that became wrong."""
    if not (difference.better or difference.worse):
        return ""
    return f"+{len(difference.better)} -{len(difference.worse)}"


def _signed(text: str, number: float) -> str:
    return f"+{text}" if number > 0 else text

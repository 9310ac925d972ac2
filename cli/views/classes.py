"""The labels of a task: a table by label, and the pairs of labels that are confused most."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.formatting import counted

if TYPE_CHECKING:
    from rich.table import Table

    from finetune.run.evaluation_results import RecordedClass, RecordedClasses

MOST_LABELS = 20
"""Labels of a table; of more, as many with the lowest F1 are shown as of confused pairs."""

SHOWN = 10


def class_tables(task: str, classes: RecordedClasses, against: str | None, is_written: bool) -> list[Table]:
    """The table by label and that of confused pairs, which is left out where no answer is wrong.

    Args:
        task: Name of the task.
        classes: As in `results.json`.
        against: The model that was compared with.
        is_written: Whether `results.json` is written, so that the rest can be found there.
    """
    from finetune.run.confusion import confusions

    pairs = confusions(classes)
    tables = [_by_label(task, classes, against, is_written)]
    return [*tables, _confused(task, classes, is_written)] if pairs else tables


def outside_text(classes: RecordedClasses) -> str:
    """How many answers are no label; empty if all are."""
    outside = classes.get("outside", 0)
    return f"answers that are no label: {outside} of {counted(classes.get('rows', 0), 'row')}" if outside else ""


def _by_label(task: str, classes: RecordedClasses, against: str | None, is_written: bool) -> Table:
    from finetune.run.confusion import f1_by_label, weakest_first

    every = classes.get("per_class", [])
    shown = every if len(every) <= MOST_LABELS else weakest_first(classes)[:SHOWN]
    rest = f" ({_of_all(is_written)})" if len(shown) < len(every) else ""
    title = f"the {len(shown)} of {len(every)} labels with the lowest F1{rest}" if rest else "by label"
    table = _table(f"{task}: {title}")
    table.add_column("", overflow="fold")
    theirs = f1_by_label(classes["against"]) if against and "against" in classes else None
    compared = [f"F1 of {against}"] if theirs is not None else []
    for column in ("precision", "recall", "F1", *compared, "support"):
        table.add_column(column, justify="right")
    for each in shown:
        other = [_percent(theirs.get(each["label"]))] if theirs is not None else []
        table.add_row(each["label"], *_figures(each), *other, str(each["support"]))
    return table


def _confused(task: str, classes: RecordedClasses, is_written: bool) -> Table:
    from finetune.run.confusion import confusions

    pairs = confusions(classes)
    rest = f" ({_of_all(is_written)})" if len(pairs) > SHOWN else ""
    several = f"the {SHOWN} most frequent of {len(pairs)}" if rest else "all"
    table = _table(f"{task}: wrong answers by label, {several}{rest}")
    table.add_column("label", overflow="fold")
    table.add_column("answer", overflow="fold")
    table.add_column("rows", justify="right", no_wrap=True)
    for pair in pairs[:SHOWN]:
        answer = "(no label)" if pair.answer is None else pair.answer
        table.add_row(pair.reference, answer, f"{pair.rows} of {pair.support}")
    return table


def _table(title: str) -> Table:
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))


def _of_all(is_written: bool) -> str:
    return "all: results.json" if is_written else "all: --json"


def _figures(each: RecordedClass) -> list[str]:
    return [_percent(each.get("precision")), _percent(each.get("recall")), _percent(each.get("f1"))]


def _percent(value: float | None) -> str:
    """`91.7 %`; a dash where it is undefined."""
    return "-" if value is None else f"{100 * value:.1f} %"

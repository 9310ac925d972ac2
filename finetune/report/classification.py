"""Labels of a task in the report: a table by label, the pairs that are confused most, and the confusion matrix."""

from __future__ import annotations

from finetune.formatting import in_html
from finetune.report.page import collapsible, table
from finetune.run.confusion import confusions, f1_by_label, labels_of
from finetune.run.evaluation_results import OtherClasses, RecordedClasses

STYLE = """
.confusion { width: auto; font-size: .7rem; overflow-wrap: normal; } .confusion :is(td, thead th) { min-width: 1.3em;
  padding: .1em .2em; text-align: center; } .confusion tbody th { white-space: nowrap; padding: .1em .6em .1em 0; }
.confusion td { background: color-mix(in srgb, var(--bad) calc(var(--part, 0) * 60%), transparent); }
.confusion td.correct { background: color-mix(in srgb, var(--good) calc(var(--part, 0) * 60%), transparent); }
"""

SHOWN_PAIRS = 15
MOST_EXPANDED = 20
"""Labels of a table that is not collapsed."""

NO_LABEL = "no label"


def classification(task: str, classes: RecordedClasses, against: str | None) -> str:
    """What is known of the labels of a task.

    Args:
        task: Name of the task.
        classes: As in `results.json`.
        against: The model that was compared with.
    """
    every = classes.get("per_class", [])
    if not every:
        return ""
    by_label = _by_label(classes, against)
    if len(every) > MOST_EXPANDED:
        by_label = collapsible(f"All {len(every)} labels", by_label, printed=True)
    pairs = _pairs(classes)
    return (
        f"<h3>{in_html(task)}: labels</h3>{by_label}"
        + (f"<h3>{in_html(task)}: most frequent wrong answers</h3>{pairs}" if pairs else "")
        + f"<h3>{in_html(task)}: confusion matrix</h3>{_matrix(classes)}"
    )


def _by_label(classes: RecordedClasses, against: str | None) -> str:
    theirs = f1_by_label(classes.get("against", {})) if against else {}
    head = ["", "precision", "recall", "F1", *([f"F1 of {against}"] if theirs else []), "support", "predicted"]
    rows = [
        [
            each["label"],
            *map(_percent, (each.get("precision"), each.get("recall"), each.get("f1"))),
            *([_percent(theirs.get(each["label"]))] if theirs else []),
            str(each["support"]),
            str(each["predicted"]),
        ]
        for each in classes.get("per_class", [])
    ]
    return table(head, rows)


def _pairs(classes: OtherClasses) -> str:
    found = [
        [each.reference, NO_LABEL if each.answer is None else each.answer, f"{each.rows} of {each.support}"]
        for each in confusions(classes)[:SHOWN_PAIRS]
    ]
    return table(["label", "answer", "rows"], found, numbers=False)


def _matrix(classes: OtherClasses) -> str:
    """Rows are the labels of the data, columns the answers by number; the shade is the part of the row's label."""
    labels = labels_of(classes)
    outside = [NO_LABEL] if classes.get("outside") else []
    heads = [str(number) for number in range(1, len(labels) + 1)] + outside
    titles = [*labels, *outside]
    head = "".join(
        f'<th scope="col" title="{in_html(title)}">{in_html(text)}</th>'
        for title, text in zip(titles, heads, strict=True)
    )
    confusion = classes.get("confusion", {})
    rows = []
    for number, each in enumerate(classes.get("per_class", [])):
        label = each["label"]
        answered = confusion.get(label, {})
        counts = [answered.get(other, 0) for other in labels] + [each.get("outside", 0) for _ in outside]
        cells = "".join(
            _cell(count, each["support"], f"{label} → {title}", column == number)
            for column, (count, title) in enumerate(zip(counts, titles, strict=True))
        )
        rows.append(f'<tr><th scope="row">{number + 1} {in_html(label)}</th>{cells}</tr>')
    return (
        '<p class="dim">Rows: labels of the data. Columns: answers, by the number of the label.</p>'
        f'<div class="scroll"><table class="confusion"><thead><tr><th scope="col"></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(count: int, support: int, title: str, is_correct: bool) -> str:
    if not count:
        return "<td></td>"
    kind = ' class="correct"' if is_correct else ""
    return f'<td{kind} style="--part:{count / max(count, support):.2f}" title="{in_html(title)}">{count}</td>'


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"

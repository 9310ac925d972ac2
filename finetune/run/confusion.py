"""What the terminal and the report show of a classification: weakest labels, and pairs that are confused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.run.evaluation_results import OtherClasses, RecordedClass


@dataclass(frozen=True)
class Confusion:
    """Rows of one label that got the same wrong answer.

    Attributes:
        reference: The label of the rows.
        answer: The label that was answered; None for answers that are no label.
        rows: Their number.
        support: Number of all rows of the label.
    """

    reference: str
    answer: str | None
    rows: int
    support: int


def confusions(classes: OtherClasses) -> list[Confusion]:
    """All wrong answers by pairs of labels, the most frequent first."""
    found = []
    for each in classes.get("per_class", []):
        label, support = each["label"], each["support"]
        answers = [*classes.get("confusion", {}).get(label, {}).items(), (None, each.get("outside", 0))]
        found += [Confusion(label, answer, rows, support) for answer, rows in answers if answer != label]
    return sorted((each for each in found if each.rows), key=lambda each: (-each.rows, each.support))


def weakest_first(classes: OtherClasses) -> list[RecordedClass]:
    """The labels that have an F1, the lowest first; of equal ones those with the most rows."""
    scored = [(f1, each) for each in classes.get("per_class", []) if (f1 := each.get("f1")) is not None]
    return [each for _, each in sorted(scored, key=lambda one: (one[0], -one[1]["support"]))]


def f1_by_label(classes: OtherClasses) -> dict[str, float | None]:
    """The F1 of each label."""
    return {each["label"]: each.get("f1") for each in classes.get("per_class", [])}


def labels_of(classes: OtherClasses) -> Sequence[str]:
    """The labels in their order."""
    return [each["label"] for each in classes.get("per_class", [])]

"""Classification: rows whose references are labels. Shape legend: N rows, K labels, C counts of a metric."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from finetune.errors import DataError
from finetune.evaluation.measurement import Column
from finetune.evaluation.metrics import Metric, prediction
from finetune.evaluation.overlap import Numbers
from finetune.recipe.sections.evaluation import Answers

MOST_LABELS = 500
"""Most labels of a task: each adds three counts to every row."""

MOST_FOUND_LABELS = 20
ROWS_PER_FOUND_LABEL = 3
"""References that nothing declares as labels are labels if they are few and repeat, such as `yes` and `no`."""


def macro_f1(counts_C: Numbers) -> float:
    """The mean of the F1 of all labels, in [0, 1].

    F1 of a label is 2 TP / (2 TP + FP + FN) = 2 TP / (support + predictions): the harmonic mean of its precision
    TP / predictions and its recall TP / support. A label without rows that is predicted has F1 0, and so has a label
    with rows that is never predicted, whose precision is undefined. A label without both has no F1 and is not part of
    the mean. Answers outside of the labels are no predictions: they lower the recall of the row's label. The value is
    that of `sklearn.metrics.f1_score(average="macro", zero_division=0)` over the labels that occur.

    Source: Yang and Liu 1999, A re-examination of text categorization methods, section 2; of the two means of that name
        the one that Opitz and Burst 2019, arXiv 1911.03347, recommend: the mean of F1, not F1 of means.

    Args:
        counts_C: Support, predictions and true positives (TP) of each label, C = 3 K.
    """
    support_K, predicted_K, correct_K = counts_C.reshape(3, -1)
    occurring_K = support_K + predicted_K > 0
    return float((2 * correct_K[occurring_K] / (support_K + predicted_K)[occurring_K]).mean())


MACRO_F1 = Metric("macro_f1", macro_f1, is_biased=True)


@dataclass(frozen=True)
class Classes:
    """References and answers of the rows of a task, as indices of labels.

    Attributes:
        labels: The labels.
        rows: The location of each row.
        references: The label of each row.
        answers: The label of each answer; None where the answer is no label.
    """

    labels: tuple[str, ...]
    rows: tuple[str, ...]
    references: tuple[int, ...]
    answers: tuple[int | None, ...]

    @classmethod
    def of(
        cls, labels: Sequence[str], rows: Sequence[str], references: Sequence[str], answers: Sequence[str]
    ) -> Classes:
        """From texts, at least one; each reference is a label."""
        index = {label: number for number, label in enumerate(labels)}
        return cls(
            tuple(labels), tuple(rows), tuple(index[each] for each in references), tuple(map(index.get, answers))
        )

    @property
    def column(self) -> Column:
        """The macro-F1 with its counts per row."""
        counts_N3K = np.zeros((len(self.rows), 3, len(self.labels)))
        for row, (reference, answer) in enumerate(zip(self.references, self.answers, strict=True)):
            counts_N3K[row, 0, reference] = 1
            if answer is not None:
                counts_N3K[row, 1, answer] = 1
                counts_N3K[row, 2, answer] = reference == answer
        return Column(MACRO_F1, self.rows, counts_N3K.reshape(len(self.rows), -1))

    def to_json(self) -> dict[str, Any]:
        """The table by label and the confusion matrix; undefined precision, recall and F1 are None."""
        answered = Counter(zip(self.references, self.answers, strict=True))
        support, predicted = Counter(self.references), Counter(self.answers)
        return {
            "rows": len(self.rows),
            "outside": predicted[None],
            "per_class": [
                {
                    "label": label,
                    "precision": _ratio(answered[index, index], predicted[index]),
                    "recall": _ratio(answered[index, index], support[index]),
                    "f1": _ratio(2 * answered[index, index], support[index] + predicted[index]),
                    "support": support[index],
                    "predicted": predicted[index],
                    "outside": answered[index, None],
                }
                for index, label in enumerate(self.labels)
            ],
            # Without zeros: of 77 labels, 5,929 numbers would be written otherwise.
            "confusion": {
                label: {
                    other: answered[index, place] for place, other in enumerate(self.labels) if answered[index, place]
                }
                for index, label in enumerate(self.labels)
            },
        }


class Asked(Protocol):
    """A row that was asked for a text."""

    @property
    def row(self) -> str:
        """Its location."""

    @property
    def calls(self) -> Sequence[Any]:
        """The tool calls of its answer."""

    @property
    def has_label(self) -> bool:
        """Whether its answer is declared as a label."""

    @property
    def choices(self) -> Sequence[str]:
        """The answers that it offers."""


def classes_of_answers(
    rows: Sequence[Asked], references: Sequence[Sequence[str]], answers: Sequence[str], section: Answers
) -> Classes | None:
    """Labels and generated answers, compared as `exact_match` compares them; None where rows have no labels.

    Rows of format `classification` have labels: those of the source, or of the rows if it names none. Other rows have
    labels where their references are few and repeat, or where the section names the metric.

    Args:
        rows: The rows, at least one.
        references: The accepted answers of each row.
        answers: The generated text of each row.
        section: How answers are scored.

    Raises:
        DataError: The section names macro-F1, and a row has several references, or there are too many.
    """
    is_named = MACRO_F1.name in section.metrics
    if not is_named and "exact_match" not in section.metrics:
        return None
    accepted = [{prediction(each).strip() for each in row} for row in references]
    several = next((row.row for row, texts in zip(rows, accepted, strict=True) if len(texts) > 1), None)
    found = set().union(*accepted)
    if several is None and len(found) <= MOST_LABELS:
        if is_named or _have_labels(rows, found):
            labels = _labels(rows, found)
            wanted = [text for texts in accepted for text in texts]
            return Classes.of(labels, [row.row for row in rows], wanted, [prediction(each).strip() for each in answers])
    elif is_named:
        raise DataError(
            f"the rows have {len(found)} different answers, more than {MOST_LABELS} labels"
            if several is None
            else f"the row accepts several answers, and {MACRO_F1.name} compares labels",
            where=several or rows[0].row,
            hint=f"leave {MACRO_F1.name} out of metrics",
        )
    return None


def _have_labels(rows: Sequence[Asked], references: Collection[str]) -> bool:
    if all(row.has_label for row in rows):
        return True
    is_repeated = len(rows) >= ROWS_PER_FOUND_LABEL * len(references)
    # A letter of a multiple choice means another answer in each row.
    is_plain = not any(row.calls or row.choices for row in rows)
    return is_plain and is_repeated and 2 <= len(references) <= MOST_FOUND_LABELS


def _labels(rows: Sequence[Asked], references: Iterable[str]) -> list[str]:
    """The labels of the source in its order, before others of the rows."""
    declared = dict.fromkeys(choice.strip() for row in rows if row.has_label for choice in row.choices)
    labels = list(declared | dict.fromkeys(sorted(references)))
    return labels if len(labels) <= MOST_LABELS else sorted(references)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None

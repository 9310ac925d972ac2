"""Figures of labels against scikit-learn and the definition; which rows have labels."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from finetune.data.dataset import LocatedDocument
from finetune.data.documents import Conversation, Message
from finetune.data.encode import Example
from finetune.errors import DataError
from finetune.evaluation.choices import Choose
from finetune.evaluation.classes import MOST_LABELS, Classes
from finetune.evaluation.generation import AnswerDecoder
from finetune.evaluation.measurement import Measurement, difference, interval
from finetune.evaluation.tasks import Generate
from finetune.models.loading.positions import PositionLimit
from finetune.recipe.sections.evaluation import ChooseTask, GenerateTask
from finetune.run.events import ignore
from tests.fixtures.templates import family_tokenizer

OUTSIDE = "?"


def drawn(seed: int, labels: Sequence[str], rows: int, asked: Sequence[str]) -> tuple[list[str], list[str]]:
    """References out of some labels, and answers that are right in half of the rows, or another label, or none."""
    draw = random.Random(seed)
    references = draw.choices(asked, weights=range(1, len(asked) + 1), k=rows)
    answers = [each if draw.random() < 0.5 else draw.choice([*labels[1:], OUTSIDE]) for each in references]
    return references, answers


def classes_of(labels: Sequence[str], references: Sequence[str], answers: Sequence[str]) -> Classes:
    return Classes.of(labels, [f"f:{row}" for row in range(len(references))], references, answers)


def f1_by_definition(references: Sequence[str], answers: Sequence[str], label: str) -> float | None:
    """From precision and recall; None where the label does not occur."""
    right = sum(one == other == label for one, other in zip(references, answers, strict=True))
    if label not in (*references, *answers):
        return None
    if not right:
        return 0.0
    precision, recall = right / list(answers).count(label), right / list(references).count(label)
    return 2 * precision * recall / (precision + recall)


def macro_by_definition(labels: Sequence[str], references: Sequence[str], answers: Sequence[str]) -> float:
    found = [f1 for label in labels if (f1 := f1_by_definition(references, answers, label)) is not None]
    return sum(found) / len(found)


CASES = [(0, 2, 9, 2), (1, 5, 60, 5), (2, 5, 12, 3), (3, 77, 100, 70), (4, 3, 1, 1)]
"""Seed, labels, rows, labels that rows have."""


def case(seed: int, count: int, rows: int, occurring: int) -> tuple[list[str], list[str], list[str]]:
    labels = [f"label_{number}" for number in range(count)]
    return labels, *drawn(seed, labels, rows, labels[:occurring])


@pytest.mark.parametrize("numbers", CASES)
def test_macro_f1_equals_the_definition(numbers: tuple[int, int, int, int]):
    labels, references, answers = case(*numbers)
    found = classes_of(labels, references, answers).column.value
    assert found == pytest.approx(macro_by_definition(labels, references, answers))


@pytest.mark.parametrize("numbers", CASES)
def test_figures_of_labels_equal_those_of_scikit_learn(numbers: tuple[int, int, int, int]):
    metrics = pytest.importorskip("sklearn.metrics")
    labels, references, answers = case(*numbers)
    classes = classes_of(labels, references, answers)
    occurring = [label for label in labels if label in (*references, *answers)]
    expected = metrics.f1_score(references, answers, labels=occurring, average="macro", zero_division=0)
    assert classes.column.value == pytest.approx(expected)
    found = classes.to_json()
    figures = metrics.precision_recall_fscore_support(references, answers, labels=labels, zero_division=np.nan)
    for name, values in zip(("precision", "recall", "f1", "support"), figures, strict=True):
        given = [np.nan if each[name] is None else each[name] for each in found["per_class"]]
        if name == "f1":  # scikit-learn's is 0 for a label that does not occur
            given = [0.0 if np.isnan(each) else each for each in given]
            values = np.nan_to_num(values)
        assert given == pytest.approx(list(values), nan_ok=True)
    matrix = metrics.confusion_matrix(references, answers, labels=[*labels, OUTSIDE])
    dense = [
        [found["confusion"][label].get(other, 0) for other in labels] + [each["outside"]]
        for label, each in zip(labels, found["per_class"], strict=True)
    ]
    assert dense == matrix[:-1].tolist()
    assert found["outside"] == answers.count(OUTSIDE)


def test_undefined_figures_are_none_and_labels_without_rows_and_answers_do_not_count():
    classes = classes_of(["a", "b", "c", "unused"], ["a", "a", "b"], ["a", "c", "a"])
    by_label = {
        each["label"]: (each["precision"], each["recall"], each["f1"]) for each in classes.to_json()["per_class"]
    }
    assert by_label == {"a": (0.5, 0.5, 0.5), "b": (None, 0, 0), "c": (0, None, 0), "unused": (None, None, None)}
    assert classes.column.value == pytest.approx(0.5 / 3)


def test_interval_of_macro_f1_equals_a_bootstrap_of_rows():
    labels, references, answers = case(5, 4, 200, 4)
    pairs, draw = list(zip(references, answers, strict=True)), random.Random(1)
    values = [macro_by_definition(labels, *zip(*draw.choices(pairs, k=200), strict=True)) for _ in range(1500)]
    column = classes_of(labels, references, answers).column
    found, (low, high) = interval(column), np.arcsin(np.sqrt(np.quantile(values, [0.025, 0.975])))
    middle = np.arcsin(np.sqrt(column.value))
    assert (found.low, found.high) == pytest.approx(np.sin([2 * middle - high, 2 * middle - low]) ** 2, abs=0.012)


@pytest.mark.parametrize(("count", "rows", "right"), [(30, 120, 0.7), (3, 60, 0.95)])
def test_interval_of_macro_f1_covers_the_true_value_of_many_and_of_few_labels(count: int, rows: int, right: float):
    labels, draw, covered = [str(number) for number in range(count)], random.Random(0), 0
    for _ in range(60):
        references = draw.choices(labels, k=rows)
        answers = [each if draw.random() < right else draw.choice(labels) for each in references]
        found = interval(classes_of(labels, references, answers).column)
        # Every label has the same precision and recall.
        covered += found.low <= right + (1 - right) / count <= found.high
    assert covered >= 53


@pytest.mark.parametrize(("answers", "low", "high"), [("abab", 0.5101, 1), ("baba", 0, 0.4899)])
def test_interval_of_macro_f1_of_rows_that_are_all_right_or_all_wrong_is_wilsons(answers: str, low: float, high: float):
    """z^2 / (n + z^2) for n = 4 rows."""
    found = interval(classes_of(["a", "b"], list("abab"), list(answers)).column)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_difference_of_macro_f1_is_paired_by_row():
    labels, references, answers = case(6, 4, 200, 4)
    better = [
        reference if row < 20 else answer
        for row, (reference, answer) in enumerate(zip(references, answers, strict=True))
    ]
    ours, theirs = (classes_of(labels, references, each).column for each in (better, answers))
    change = difference(ours, theirs).change
    assert change.value == pytest.approx(ours.value - theirs.value)
    assert 0 < change.low < change.value < change.high
    assert change.high - change.low < interval(ours).high - interval(ours).low
    assert difference(ours, ours).change.low == difference(ours, ours).change.high == 0


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def generated(
    folder: Path, rows: Sequence[dict[str, Any]], answers: Sequence[str], source: dict[str, Any], **section: Any
) -> Measurement:
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tokenizer = family_tokenizer("qwen3")
    engine: Any = SimpleNamespace(
        tokenizer=tokenizer,
        decoder=AnswerDecoder(tokenizer, []),
        limit=PositionLimit(None),
        label="fake",
        answers=lambda *arguments: list(answers),
    )
    data = {"path": str(folder / "rows.jsonl"), **source}
    task = Generate(
        TypeAdapter(GenerateTask).validate_python({"name": "t", "kind": "generate", "data": data, **section})
    )
    found = task.measure(engine, None, ignore)
    assert {column.metric.name for column in found.columns} <= set(task.metrics or ())
    return found


def macro_of(found: Measurement) -> float | None:
    assert (found.classes is None) == ("macro_f1" not in [column.metric.name for column in found.columns])
    return next((column.value for column in found.columns if column.metric.name == "macro_f1"), None)


CLASSIFICATION = {"format": "classification", "labels": ["good", "bad", "fair"]}


def test_answers_to_rows_of_a_classification_are_compared_by_the_labels_of_the_source(tmp_path: Path):
    rows = [{"text": text, "label": label} for text, label in (("a", "good"), ("b", "bad"), ("c", "good"))]
    found = generated(tmp_path, rows, [" good\n", "<think>good</think>fair", "Good"], CLASSIFICATION)
    assert found.classes is not None
    assert found.classes.labels == ("good", "bad", "fair")
    assert found.classes.answers == (0, 2, None)  # white space and reasoning are ignored, as by exact match
    assert macro_of(found) == pytest.approx((2 / 3 + 0 + 0) / 3)


def test_labels_that_the_source_does_not_name_are_those_of_the_rows(tmp_path: Path):
    rows = [{"text": text, "label": label} for text, label in (("a", "no"), ("b", "yes"))]
    found = generated(tmp_path, rows, ["no", "maybe"], {"format": "classification"})
    assert found.classes is not None
    assert (found.classes.labels, found.classes.answers) == (("no", "yes"), (0, None))


@pytest.mark.parametrize(
    ("answers", "section", "has_labels"),
    [
        (["yes", "no"] * 3, {}, True),
        (["yes", "no"] * 2, {}, False),  # too few rows to tell labels from texts
        (["yes"] * 6, {}, False),
        ([f"text {row}" for row in range(6)], {}, False),
        ([f"text {row}" for row in range(6)], {"metrics": ["macro_f1"]}, True),
        (["yes", "no"] * 3, {"metrics": ["rouge_l"]}, False),
        (["yes", "no"] * 3, {"metrics": ["macro_f1", "rouge_l"]}, True),
    ],
)
def test_rows_of_other_formats_have_labels_where_answers_repeat_or_the_metric_is_named(
    answers: list[str], section: dict[str, Any], has_labels: bool, tmp_path: Path
):
    rows = [chat(f"question {row}", answer) for row, answer in enumerate(answers)]
    found = generated(tmp_path, rows, answers, {"format": "chat"}, **section)
    assert macro_of(found) == (1 if has_labels else None)


def test_letters_of_a_multiple_choice_are_no_labels(tmp_path: Path):
    rows = [{"question": f"Which {row}?", "choices": [f"{row} x", f"{row} y"], "answer": row % 2} for row in range(12)]
    assert macro_of(generated(tmp_path, rows, ["A"] * 12, {"format": "multiple_choice"})) is None


@pytest.mark.parametrize("references", [["Rome", "Roma"], ["Rome"]])
def test_named_macro_f1_of_rows_without_labels_is_an_error_at_the_row(references: list[str], tmp_path: Path):
    count = 1 if len(references) > 1 else MOST_LABELS + 1
    rows = [{"question": f"{row}", "answers": [f"{text} {row}" for text in references]} for row in range(count)]
    with pytest.raises(DataError, match="accepts several answers" if count == 1 else str(MOST_LABELS)) as caught:
        generated(tmp_path, rows, ["Rome"] * count, {"format": "qa"}, metrics=["macro_f1"])
    assert caught.value.where == f"{tmp_path / 'rows.jsonl'}:1"
    # Beside it the default metrics leave it out.
    assert macro_of(generated(tmp_path, rows, ["Rome"] * count, {"format": "qa"})) is None


def chosen(
    folder: Path, rows: Sequence[dict[str, Any]], section: dict[str, Any], log_probs: Sequence[float]
) -> tuple[Measurement, Choose, list[Example]]:
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    seen: list[Example] = []

    def likelihoods(examples: list[Example], on_progress: Any) -> list[SimpleNamespace]:
        seen.extend(examples)
        return [SimpleNamespace(log_prob=log_prob) for log_prob in log_probs]

    engine: Any = SimpleNamespace(
        tokenizer=family_tokenizer("qwen3"), limit=PositionLimit(None), label="fake", likelihoods=likelihoods
    )
    data = {"path": str(folder / "rows.jsonl"), **section.pop("data")}
    task = Choose(TypeAdapter(ChooseTask).validate_python({"name": "t", "kind": "choose", "data": data, **section}))
    return task.measure(engine, None, ignore), task, seen


@pytest.mark.parametrize("in_task", [True, False])
def test_choices_of_all_rows_are_labels(in_task: bool, tmp_path: Path):
    rows = [{"text": text, "label": label} for text, label in (("a", "good"), ("b", "bad"))]
    source = {"format": "classification"} if in_task else CLASSIFICATION
    section = {"data": source, **({"choices": CLASSIFICATION["labels"]} if in_task else {})}
    found, task, _ = chosen(tmp_path, rows, section, [-1.0, -2.0, -3.0, -3.0, -2.0, -1.0])
    assert task.metrics == ["accuracy", "accuracy_norm", "macro_f1"]
    assert [column.metric.name for column in found.columns] == task.metrics
    assert found.classes is not None
    assert (found.classes.references, found.classes.answers) == ((0, 1), (0, 2))
    assert macro_of(found) == pytest.approx(1 / 3)


def test_choices_of_validation_rows_of_a_classification_are_labels(tmp_path: Path):
    messages = [(Message("user", text), Message("assistant", label)) for text, label in (("a", "good"), ("b", "bad"))]
    documents = [
        LocatedDocument(Conversation(each, choices=("good", "bad"), has_label=True), f"f:{row}")
        for row, each in enumerate(messages)
    ]
    validation: Any = SimpleNamespace(documents=lambda: iter(documents))
    task = Choose(TypeAdapter(ChooseTask).validate_python({"name": "t", "kind": "choose"}), validation)
    log_probs = [SimpleNamespace(log_prob=value) for value in (-1.0, -2.0, -1.0, -2.0)]
    engine: Any = SimpleNamespace(
        tokenizer=family_tokenizer("qwen3"), limit=PositionLimit(None), label="fake", likelihoods=lambda *_: log_probs
    )
    found = task.measure(engine, None, ignore)
    assert "macro_f1" in (task.metrics or ())
    assert found.classes is not None
    assert (found.classes.labels, found.classes.answers) == (("good", "bad"), (0, 0))


def test_choices_of_each_row_are_no_labels(tmp_path: Path):
    rows = [{"question": "Which?", "choices": ["x", "y"], "answer": 1}] * 2
    found, task, _ = chosen(tmp_path, rows, {"data": {"format": "multiple_choice"}}, [-1.0, -2.0] * 2)
    assert "macro_f1" not in (task.metrics or ())
    assert macro_of(found) is None


@pytest.mark.parametrize(("choices", "has_end"), [(["red", "red wine"], True), (["red", "blue"], False)])
def test_end_of_turn_is_measured_where_one_choice_begins_another(choices: list[str], has_end: bool, tmp_path: Path):
    """Without an end, `red` would be at least as likely as `red wine` in every row."""
    _, _, seen = chosen(
        tmp_path, [{"text": "a", "label": "red"}], {"data": {"format": "classification"}, "choices": choices}, [-1, -2]
    )
    tokenizer = family_tokenizer("qwen3")
    ends = ["<|im_end|>" if has_end else ""] * 2
    measured = [
        tokenizer.decode([token for token, is_target in zip(each.ids, each.is_target, strict=True) if is_target])
        for each in seen
    ]
    assert [text.partition("</think>\n\n")[2] or text for text in measured] == [
        choice + end for choice, end in zip(choices, ends, strict=True)
    ]

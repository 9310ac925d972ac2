"""Answers that are numbers: of choices, which are never question answering alone, and of labels."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

from finetune.data.documents import Conversation
from finetune.data.rows import Row
from finetune.errors import DataError
from finetune.recipe.sections.data import Source
from finetune.resolve import build
from tests.unit.data.test_formats import document, error_of


def answer(row: dict[str, Any], **source: Any) -> str:
    found = document(row, **source)
    assert isinstance(found, Conversation)
    return found.messages[-1].content


def auto() -> Any:
    return build(TypeAdapter(Source).validate_python({"path": "rows.jsonl", "format": "auto"}))


@pytest.mark.parametrize("choices", ["choices", "options", "Choices"])
@pytest.mark.parametrize("right", ["answer", "answerKey", "answers", "label"])
def test_auto_takes_table_with_choices_for_multiple_choice(choices: str, right: str):
    row = {"question": "a", choices: ["b", "c"], right: "B"}
    assert document(row, format="auto") == document(row, format="multiple_choice", choices=choices, answer=right)


@pytest.mark.parametrize("choices", ["b or c", 3, {"A": "b"}])
@pytest.mark.parametrize("right", ["answer", "answers"])
def test_auto_choices_that_are_no_list_raise(choices: Any, right: str):
    error = error_of({"question": "a", "choices": choices, right: "0"}, format="auto")
    assert "column 'choices'" in error.what


@pytest.mark.parametrize(
    "columns",
    [
        ("A", "B", "C", "D"),
        ("opa", "opb"),
        ("option_1", "option_2", "option_3"),
        ("choice1", "choice2"),
        ("Option A", "Option B"),
    ],
)
def test_auto_choices_in_columns_of_their_own_raise(columns: tuple[str, ...]):
    row = {"question": "a", **dict.fromkeys(columns, "b"), "answer": "A"}
    error = error_of(row, format="auto")
    assert "columns of their own" in error.what
    assert columns[0] in error.what
    assert "multiple_choice" in str(error.hint)
    assert answer(row, format="qa", answers="answer") == "A"


def test_auto_question_and_answer_beside_one_lettered_column_is_qa():
    assert answer({"question": "a", "d": "2026", "answer": "b"}, format="auto") == "b"


@pytest.mark.parametrize("none", [None, "", []])
def test_auto_row_with_choices_after_rows_without_raises(none: Any):
    rows = auto()
    assert rows.document(Row({"question": "a", "options": none, "answer": "b"}, "rows.jsonl:1"))
    with pytest.raises(DataError, match=r"format qa that was detected on rows\.jsonl:1: column 'options' has choices"):
        rows.document(Row({"question": "a", "options": ["b", "c"], "answer": "1"}, "rows.jsonl:7"))


@pytest.mark.parametrize(
    ("choices", "found", "expected"),
    [
        (["red", "blue", "green"], "2", "green"),
        (["red", "blue"], "0", "red"),
        (["10", "20", "30"], "2", "30"),
        (["1", "2", "3"], "2", "2"),
        ({"text": ["red", "blue"], "label": ["1", "2"]}, "1", "red"),
        ({"text": ["red", "blue"], "label": ["x", "y"]}, "1", "blue"),
    ],
)
def test_multiple_choice_digits_are_index_unless_they_are_a_choice(choices: Any, found: str, expected: str):
    row = {"question": "a", "choices": choices, "answer": found}
    assert answer(row, format="multiple_choice", answer_with="text") == expected


@pytest.mark.parametrize("found", ["2", "-1", "1.0", "", "²"])
def test_multiple_choice_digits_that_are_no_index_raise(found: str):
    row = {"question": "a", "choices": ["red", "blue"], "answer": found}
    assert "matches none" in error_of(row, format="multiple_choice").what


@pytest.mark.parametrize(
    ("found", "expected"), [("0", "bad"), ("1", "good"), (" 1", "good"), (1, "good"), ("bad", "bad")]
)
def test_classification_digits_name_label_by_number(found: Any, expected: str):
    row = {"text": "a", "label": found}
    assert answer(row, format="classification", labels=["bad", "good"]) == expected


def test_classification_digits_are_names_where_labels_are_digits():
    labels = ["1", "2", "3", "4", "5"]
    assert answer({"text": "a", "label": "2"}, format="classification", labels=labels) == "2"
    assert "must be one of" in error_of({"text": "a", "label": "0"}, format="classification", labels=labels).what


@pytest.mark.parametrize("found", ["2", "-1", "1.0"])
def test_classification_digits_beyond_labels_raise(found: str):
    error = error_of({"text": "a", "label": found}, format="classification", labels=["bad", "good"])
    assert "must be one of bad, good" in error.what
    assert found in error.what


@pytest.mark.parametrize("found", ["1", 1])
def test_classification_number_without_names_raises(found: Any):
    error = error_of({"text": "a", "label": found}, format="classification")
    assert "the labels have no names" in error.what
    assert "labels: [...]" in str(error.hint)

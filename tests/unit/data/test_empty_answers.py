"""Answers without words are bad rows, which `data.on_bad_row` governs; answers that call a tool are not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

from finetune.data.bad_rows import EMPTY
from finetune.data.encode import Encoder
from finetune.data.rows import Row
from finetune.errors import BadRow
from finetune.recipe.sections.data import Source
from finetune.resolve import build
from tests.fixtures.tiny import tiny_tokenizer
from tests.unit.data.test_formats import document, error_of, turn

EMPTY_TEXTS = ["", " ", "\n\t \n", "\u00a0"]


@pytest.mark.parametrize("text", EMPTY_TEXTS)
@pytest.mark.parametrize(
    ("row", "column", "source"),
    [
        ({"instruction": "a"}, "output", {"format": "instruction"}),
        ({"prompt": "a"}, "completion", {"format": "completion"}),
        ({"prompt": "a"}, "completion", {"format": "completion", "chat_template": True}),
        ({"q": "a"}, "r", {"format": "completion", "prompt": "q", "completion": "r"}),
        ({"question": "a"}, "answers", {"format": "qa"}),
        ({"text": "a"}, "label", {"format": "classification"}),
        ({"text": "a"}, "label", {"format": "classification", "labels": ["good", "bad"]}),
    ],
)
def test_empty_answer_is_bad_row_that_names_its_column(
    row: dict[str, Any], column: str, source: dict[str, Any], text: str
):
    error = error_of({**row, column: text}, **source)
    assert isinstance(error, BadRow)
    assert error.reason == EMPTY
    assert repr(column) in error.what


@pytest.mark.parametrize("answers", [[""], ["\n", "Ann"], {"text": [" "]}, [], {"text": [], "answer_start": []}])
def test_qa_without_first_answer_is_bad_row(answers: Any):
    error = error_of({"question": "a", "answers": answers}, format="qa")
    assert isinstance(error, BadRow)
    assert error.reason == EMPTY


def test_qa_first_answer_counts_alone():
    document({"question": "a", "answers": ["Ann", ""]}, format="qa")


def test_multiple_choice_empty_choice_is_bad_row_where_it_is_trained():
    row = {"question": "a", "choices": ["b", " "], "answer": 1}
    document(row, format="multiple_choice")
    document({**row, "answer": 0}, format="multiple_choice", answer_with="text")
    error = error_of(row, format="multiple_choice", answer_with="text")
    assert isinstance(error, BadRow)
    assert error.reason == EMPTY


@pytest.mark.parametrize("text", EMPTY_TEXTS)
def test_text_without_words_is_bad_row(text: str):
    error = error_of({"text": text}, format="text")
    assert isinstance(error, BadRow)
    assert error.reason == "without text"


def test_null_answer_is_no_bad_row_but_malformed():
    assert not isinstance(error_of({"instruction": "a", "output": None}, format="instruction"), BadRow)


def test_auto_empty_answer_is_bad_row_on_first_and_later_rows():
    auto = build(TypeAdapter(Source).validate_python({"path": "rows.jsonl", "format": "auto"}))
    rows = [
        {"question": "a", "response": " "},
        {"question": "b", "response": "c"},
        {"question": "d", "context": "e", "response": ""},
    ]
    for row in (rows[0], rows[2]):
        with pytest.raises(BadRow) as caught:
            auto.document(Row(row, "rows.jsonl:5"))
        assert caught.value.reason == EMPTY
    assert auto.document(Row(rows[1], "rows.jsonl:6"))


def test_chat_empty_answer_is_left_to_the_encoder():
    """Whether an answer of a conversation is a target depends on `data.train_on`."""
    document({"messages": [turn("user", "a"), turn("assistant", "")]}, format="chat")


@pytest.mark.parametrize("keys", [{"content": None}, {}, {"content": " "}])
def test_null_answer_is_empty_answer(keys: dict[str, Any]):
    row = document({"messages": [turn("user", "a"), {"role": "assistant", **keys}]}, format="chat")
    with pytest.raises(BadRow) as caught:
        Encoder(tiny_tokenizer(), "assistant").examples(row, "row")
    assert caught.value.reason == EMPTY
    assert "refusal" not in str(caught.value)


def test_null_answer_beside_refusal_names_the_refusal():
    refused = {"role": "assistant", "content": None, "refusal": "No."}
    row = document({"messages": [turn("user", "a"), refused]}, format="chat")
    with pytest.raises(BadRow) as caught:
        Encoder(tiny_tokenizer(), "assistant").examples(row, "row")
    assert (caught.value.reason, "'refusal'" in caught.value.what) == (EMPTY, True)


def test_null_answer_without_targets_is_context():
    turns = [turn("user", "a"), {**turn("assistant", None), "train": False}, turn("user", "b"), turn("assistant", "c")]
    (example,) = Encoder(tiny_tokenizer(), "assistant").examples(document({"messages": turns}, format="chat"), "row")
    assert example.targets == len("c") + 1

"""Columns of a row: there and of the right type, or a message that is short whatever the row holds."""

from __future__ import annotations

import datetime

import pytest

from finetune.data.rows import Row, describe
from finetune.errors import DataError


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "null"),
        (3, "a number (3)"),
        (0.5, "a number (0.5)"),
        (True, "a boolean (true)"),
        (["x"], 'a list (["x"])'),
        ({"b": "x"}, 'an object ({"b": "x"})'),
        (datetime.date(2026, 1, 2), 'a date ("2026-01-02")'),
        (b"x" * 999, "a bytes (\"b'xxx"),
    ],
)
def test_a_column_of_another_type_says_what_was_found_and_where(value: object, found: str):
    with pytest.raises(DataError) as caught:
        Row({"a": value}, "rows.jsonl:7").text("a")
    assert caught.value.what.startswith(f"column 'a' must be text, found {found}")
    assert len(caught.value.what) < 120
    assert caught.value.where == "rows.jsonl:7"


def test_a_missing_column_says_which_there_are():
    with pytest.raises(DataError, match="no column 'a'; its columns are: b, c") as caught:
        Row({"b": "x", "c": "y"}, "rows.jsonl:7").text("a")
    assert caught.value.where == "rows.jsonl:7"
    with pytest.raises(DataError, match="its columns are: none"):
        Row({}, "rows.jsonl:7").text("a")


def test_columns_without_number_make_no_message_without_end():
    with pytest.raises(DataError) as caught:
        Row({f"column_{index}": "" for index in range(9000)}, "rows.jsonl:7").text("a")
    assert len(caught.value.what) < 120


def test_an_optional_column_may_be_absent_or_null_but_not_of_another_type():
    assert Row({}, "row").optional_text("a") == ""
    assert Row({"a": None}, "row").optional_text("a") == ""
    assert Row({"a": "x"}, "row").optional_text("a") == "x"
    with pytest.raises(DataError, match="must be text"):
        Row({"a": 0}, "row").optional_text("a")


def test_a_description_shows_sixty_characters_of_a_value():
    assert describe("x" * 58) == f'text ("{"x" * 58}")'
    assert describe("x" * 1000) == f'text ("{"x" * 58}…)'

"""Columns of a row: present and of the right type, or a short error whatever the row contains."""

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
        (datetime.date(2026, 1, 2), 'a value without a JSON type ("2026-01-02")'),
        ({"b": b"x"}, 'an object ({"b": "binary data (1 bytes)"})'),
        (b"x" * 999, "binary data (999 bytes)"),
    ],
)
def test_row_text_of_other_type_raises_with_value_and_place(value: object, found: str):
    with pytest.raises(DataError) as caught:
        Row({"a": value}, "rows.jsonl:7").text("a")
    assert caught.value.what.startswith(f"column 'a' must be text, found {found}")
    assert len(caught.value.what) < 120
    assert caught.value.where == "rows.jsonl:7"


def test_row_missing_column_error_lists_columns():
    with pytest.raises(DataError, match="no column 'a'; its columns are: b, c") as caught:
        Row({"b": "x", "c": "y"}, "rows.jsonl:7").text("a")
    assert caught.value.where == "rows.jsonl:7"
    with pytest.raises(DataError, match="its columns are: none"):
        Row({}, "rows.jsonl:7").text("a")


def test_row_error_with_many_columns_stays_short():
    with pytest.raises(DataError) as caught:
        Row({f"column_{index}": "" for index in range(9000)}, "rows.jsonl:7").text("a")
    assert len(caught.value.what) < 120


def test_row_optional_text_may_be_absent_or_null():
    assert Row({}, "row").optional_text("a") == ""
    assert Row({"a": None}, "row").optional_text("a") == ""
    assert Row({"a": "x"}, "row").optional_text("a") == "x"
    with pytest.raises(DataError, match="must be text"):
        Row({"a": 0}, "row").optional_text("a")


def test_describe_shows_sixty_characters():
    assert describe("x" * 58) == f'text ("{"x" * 58}")'
    assert describe("x" * 1000) == f'text ("{"x" * 58}…)'

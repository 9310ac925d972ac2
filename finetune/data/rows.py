"""Rows: named values and their place, whatever file or data set they were read from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.errors import DataError

SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Attributes:
        values: Column name to value.
        where: Place of the row for messages, such as `file:line`.
    """

    values: Mapping[str, Any]
    where: str

    def text(self, column: str) -> str:
        """The text in a required column.

        Raises:
            DataError: The column is missing or contains something else.
        """
        if column not in self.values:
            raise DataError(
                f"the row has no column {column!r}; its columns are: {excerpt(', '.join(self.values)) or 'none'}",
                where=self.where,
                hint="correct the row, or set the name of its column in the source's section of the recipe",
            )
        value = self.values[column]
        if not isinstance(value, str):
            raise DataError(
                f"column {column!r} must be text, found {describe(value)}", where=self.where, hint="correct the row"
            )
        return value

    def optional_text(self, column: str) -> str:
        """The text in a column; empty where the column is absent or null."""
        return self.text(column) if self.values.get(column) is not None else ""


def describe(value: Any) -> str:
    """JSON type and first characters of a value, for messages."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    if value is None:
        return "null"
    try:
        shown = excerpt(json.dumps(value, ensure_ascii=False, default=str))
    except RecursionError:  # json.dumps needs a deeper stack than the parser that accepted the value
        shown = "nested deeply"
    return f"{kinds.get(type(value), f'a {type(value).__name__}')} ({shown})"


def excerpt(text: str) -> str:
    """The first characters of a text, for messages."""
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"

"""Rows: named values and their place, whatever file or data set they were read from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finetune.errors import DataError

SHOWN_CHARACTERS = 60

Typing = Literal["by_value", "by_column", "none"]
"""What has a type: each value (JSON), each column (Parquet, Arrow, the hub), or nothing (CSV, where a cell is text)."""


class LabelName(str):
    """The name of a label that the data set stores as a number.

    Attributes:
        number: The number.
    """

    number: int

    def __new__(cls, name: str, number: int = -1) -> LabelName:
        """Make the name of a label; `number` has a default for pickle, which restores it afterwards."""
        label = super().__new__(cls, name)
        label.number = number
        return label


class PartialObject(dict[str, Any]):
    """An object of a struct column without the keys that are null, because another row may be why they exist.

    Args:
        values: Keys that have a value.
        fields: All keys of the column's type, in order.

    Attributes:
        fields: As given.
    """

    def __init__(self, values: Iterable[tuple[str, Any]] = (), fields: tuple[str, ...] = ()) -> None:
        super().__init__(values)
        self.fields = fields


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Attributes:
        values: Column name to value.
        where: Place of the row for messages, such as `file:line`.
        typing: What has a type in the source.
    """

    values: Mapping[str, Any]
    where: str
    typing: Typing = "by_value"

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
                f"column {column!r} must be text, found {describe(value)}",
                where=self.where,
                hint=self.fix_of_type(column),
            )
        return value

    def optional_text(self, column: str) -> str:
        """The text in a column; empty where the column is absent or null."""
        return self.text(column) if self.values.get(column) is not None else ""

    def fix_of_type(self, column: str) -> str:
        """What to do about a value of the wrong type: in a source with types by column, every row has it."""
        if self.typing == "by_column" and self.values.get(column) is not None:
            return (
                "every row of the column has this type: convert the column, or name another one in the source's section"
            )
        return "correct the row"


def describe(value: Any) -> str:
    """JSON type and first characters of a value, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bytes):
        return _without_type(value)
    try:
        shown = excerpt(json.dumps(value, ensure_ascii=False, default=_without_type))
    except RecursionError:  # json.dumps needs a deeper stack than the parser that accepted the value
        shown = "nested deeply"
    kind = next((name for types, name in _KINDS if isinstance(value, types)), "a value without a JSON type")
    return f"{kind} ({shown})"


def _without_type(value: Any) -> str:
    """A value that JSON has no type for, which only columns of Parquet and Arrow files can have."""
    return f"binary data ({len(value)} bytes)" if isinstance(value, bytes) else str(value)


_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (dict, "an object"),
    (list, "a list"),
    (str, "text"),
    (bool, "a boolean"),  # before numbers, whose subclass it is
    ((int, float), "a number"),
)


def excerpt(text: str) -> str:
    """The first characters of a text, for messages."""
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"

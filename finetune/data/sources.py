"""Rows from local files, each with the place where it stands."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import DataError

LONGEST_LINE_BYTES = 16 << 20
SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        values: Column name to value.
        where: `file:line`, for messages.
    """

    values: Mapping[str, Any]
    where: str

    def text(self, column: str) -> str:
        """The text in a column that must be there.

        Raises:
            DataError: The column is missing or holds no text.
        """
        if column not in self.values:
            columns = ", ".join(map(str, self.values)) or "none"
            raise DataError(
                f"the row has no column {column!r}; its columns are: {columns}",
                where=self.where,
                hint="correct the row, or name its column in the source's section of the recipe",
            )
        value = self.values[column]
        if not isinstance(value, str):
            raise DataError(
                f"column {column!r} must be text, found {describe(value)}", where=self.where, hint="correct the row"
            )
        return value

    def optional_text(self, column: str) -> str:
        """The text in a column, or an empty one where the column is absent or null."""
        return self.text(column) if self.values.get(column) is not None else ""


def describe(value: Any) -> str:
    """A value's JSON type and the beginning of it, short enough for a message."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    if value is None:
        return "null"
    shown = json.dumps(value, ensure_ascii=False)
    cut = shown if len(shown) <= SHOWN_CHARACTERS else shown[: SHOWN_CHARACTERS - 1] + "…"
    return f"{kinds.get(type(value), type(value).__name__)} ({cut})"


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSONL file, in order; blank lines, CRLF and a byte order mark are accepted.

    Raises:
        DataError: No such file, another kind of file, or a line that is not one JSON object in UTF-8.
    """
    if path.suffix != ".jsonl":
        raise DataError("expected a .jsonl file", where=str(path), hint="write one JSON object a line")
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        raise DataError(
            "there is no such file", where=str(path), hint="check the source's path in the recipe"
        ) from None
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", where=str(path)) from error
    with stream:
        number = 0
        while line := stream.readline(LONGEST_LINE_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > LONGEST_LINE_BYTES:
                raise DataError("the line is longer than 16 MiB", where=where, hint="split the row")
            text = _decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, where)
            if text.strip():
                yield Row(_parse(text, where), where)


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte {line[error.start]:#04x} is not UTF-8",
            where=f"{where}:{error.start + 1}",
            hint="save the file as UTF-8",
        ) from error


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise DataError(
            f"not valid JSON: {error.msg}", where=f"{where}:{error.colno}", hint="a line is one JSON object"
        ) from error
    except (ValueError, RecursionError) as error:  # NaN, a number of thousands of digits, endless nesting
        raise DataError(
            f"not valid JSON: {str(error)[:SHOWN_CHARACTERS]}", where=where, hint="a line is one JSON object"
        ) from error
    if not isinstance(value, dict):
        raise DataError(
            f"expected a JSON object, found {describe(value)}", where=where, hint="a line is one JSON object"
        )
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return values

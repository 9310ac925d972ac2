"""Rows from local files, each with the place where it stands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import DataError

LONGEST_LINE_BYTES = 16 << 20
SHOWN_CHARACTERS = 60

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


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
            raise DataError(
                f"the row has no column {column!r}; its columns are: {excerpt(', '.join(self.values)) or 'none'}",
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
    try:
        shown = excerpt(json.dumps(value, ensure_ascii=False))
    except RecursionError:  # writing takes a little more of the stack than reading
        shown = "nested deeply"
    return f"{kinds[type(value)]} ({shown})"


def excerpt(text: str) -> str:
    """The beginning of a text, short enough for a message."""
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


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
    hint = "a line is one JSON object"
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_without_duplicates)
        is_unicode = _SURROGATE.search(text) is None or _is_unicode(value)
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON: {error.msg}", where=f"{where}:{error.colno}", hint=hint) from error
    except RecursionError as error:
        raise DataError("not valid JSON: nested too deeply", where=where, hint=hint) from error
    except ValueError as error:  # NaN, a number of thousands of digits, a key that stands twice
        raise DataError(f"not valid JSON: {excerpt(str(error))}", where=where, hint=hint) from error
    if not isinstance(value, dict):
        raise DataError(f"expected a JSON object, found {describe(value)}", where=where, hint=hint)
    if not is_unicode:
        raise DataError(
            "not valid JSON: half of an escaped character",
            where=where,
            hint="write both halves, as in \\ud83d\\ude00, or the character itself",
        )
    return value


def _is_unicode(value: Any) -> bool:
    """Whether all text in a value can be encoded; a tokenizer refuses half a surrogate pair without a word why."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return values

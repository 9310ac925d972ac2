"""A cursor that reads JSON text value by value and reports errors by line and column.

Stricter than the `json` module: no NaN or Infinity, no duplicate keys, no unpaired surrogates.
"""

from __future__ import annotations

import json
import re
from typing import Any

from finetune.data.rows import describe, excerpt
from finetune.errors import DataError

_SPACE = re.compile(r"[ \t\n\r]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonCursor:
    """Reads one value after the other; every error has its `file:line:column`.

    Args:
        text: The JSON text.
        file: The file, for messages.
        line: Line of the file in which the text begins, from 1.
        hint: Hint of error messages.
    """

    def __init__(self, text: str, file: str, line: int, hint: str) -> None:
        self._text = text
        self._file = file
        self._hint = hint
        self._position = 0
        self._line = line
        self._line_start = 0

    @property
    def where(self) -> str:
        """`file:line:column` of the next value."""
        self._skip_space()
        return self._place(self._position)

    def peek(self) -> str:
        """The next character after white space; empty at the end."""
        self._skip_space()
        return self._text[self._position : self._position + 1]

    def take(self, expected: str) -> str:
        """Consume the next character, which must be one of those in `expected`.

        Raises:
            DataError: It is another character.
        """
        found = self.peek()
        if not found or found not in expected:
            raise self._fault(f"not valid JSON: expected {' or '.join(expected)}, found {found or 'the end'}")
        self._position += 1
        return found

    def value(self) -> Any:
        """Consume a value and return it.

        Raises:
            DataError: The text is not valid JSON here.
        """
        start = self._skip_space()
        try:
            value, self._position = _DECODER.raw_decode(self._text, start)
            # Encoding the value is the proof, but costs as much as parsing; few values contain an escaped surrogate.
            is_unicode = _SURROGATE.search(self._text, start, self._position) is None or _is_unicode(value)
        except json.JSONDecodeError as error:
            raise self._fault(f"not valid JSON: {error.msg}", error.pos) from error
        except RecursionError as error:
            raise self._fault("not valid JSON: nested too deeply") from error
        except ValueError as error:  # NaN, a number of thousands of digits, a duplicate key
            raise self._fault(f"not valid JSON: {excerpt(str(error))}") from error
        if not is_unicode:
            raise DataError(
                "not valid JSON: half of an escaped character (unpaired surrogate)",
                where=self._place(start),
                hint="write both halves, as in \\ud83d\\ude00, or the character itself",
            )
        return value

    def object(self) -> dict[str, Any]:
        """Consume a value, which must be an object, and return it.

        Raises:
            DataError: The value is no object, or not valid JSON.
        """
        start = self._skip_space()
        value = self.value()
        if not isinstance(value, dict):
            raise self._fault(f"expected a JSON object, found {describe(value)}", start)
        return value

    def end(self) -> None:
        """Check that only white space follows.

        Raises:
            DataError: Something else follows.
        """
        if self.peek():
            raise self._fault("not valid JSON: Extra data")

    def _skip_space(self) -> int:
        match = _SPACE.match(self._text, self._position)
        assert match is not None
        self._position = match.end()
        return self._position

    def _fault(self, what: str, position: int | None = None) -> DataError:
        return DataError(what, where=self._place(self._position if position is None else position), hint=self._hint)

    def _place(self, position: int) -> str:
        """`file:line:column` of a position.

        Lines are counted from the previous position, so that the whole text is scanned once; positions must ascend.
        """
        self._line += self._text.count("\n", self._line_start, position)
        self._line_start = self._text.rfind("\n", 0, position) + 1
        return f"{self._file}:{self._line}:{position - self._line_start + 1}"


def json_value(text: str) -> Any:
    """The value of JSON text in a cell, parsed as strictly as a file.

    Raises:
        ValueError: The text is not valid JSON, with the reason.
    """
    cursor = JsonCursor(text, file="", line=1, hint="")
    try:
        value = cursor.value()
        cursor.end()
    except DataError as error:
        raise ValueError(error.what) from error
    return value


def _is_unicode(value: Any) -> bool:
    """Whether all text in a value can be encoded as UTF-8; tokenizers fail on unpaired surrogates without a reason."""
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
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return values


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_without_duplicates)

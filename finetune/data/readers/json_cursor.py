"""A place in a JSON text that moves on value by value. Strict: no NaN, no key twice, no half of a character."""

from __future__ import annotations

import json
import re
from typing import Any

from finetune.data.rows import describe, excerpt
from finetune.errors import DataError

_SPACE = re.compile(r"[ \t\n\r]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonCursor:
    """Reads one value after the other; every fault has its `file:line:column`.

    Args:
        text: The JSON.
        file: Its file, for messages.
        line: The line of the file in which the text begins, counted from 1.
        hint: What the file should be, for messages.
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
        """The place of the next value."""
        self._skip_space()
        return self._place(self._position)

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        self._skip_space()
        return self._text[self._position : self._position + 1]

    def take(self, expected: str) -> str:
        """Move over the next character, which must be one of those in `expected`.

        Raises:
            DataError: It is another.
        """
        found = self.peek()
        if not found or found not in expected:
            raise self._fault(f"not valid JSON: expected {' or '.join(expected)}, found {found or 'the end'}")
        self._position += 1
        return found

    def value(self) -> Any:
        """Move over a value and return it.

        Raises:
            DataError: There is none that the standard allows.
        """
        start = self._skip_space()
        try:
            value, self._position = _DECODER.raw_decode(self._text, start)
            is_unicode = _SURROGATE.search(self._text, start, self._position) is None or _is_unicode(value)
        except json.JSONDecodeError as error:
            raise self._fault(f"not valid JSON: {error.msg}", error.pos) from error
        except RecursionError as error:
            raise self._fault("not valid JSON: nested too deeply") from error
        except ValueError as error:  # NaN, a number of thousands of digits, a key that stands twice
            raise self._fault(f"not valid JSON: {excerpt(str(error))}") from error
        if not is_unicode:
            raise DataError(
                "not valid JSON: half of an escaped character",
                where=self._place(start),
                hint="write both halves, as in \\ud83d\\ude00, or the character itself",
            )
        return value

    def object(self) -> dict[str, Any]:
        """Move over a value, which must be an object, and return it.

        Raises:
            DataError: It is something else.
        """
        start = self._skip_space()
        value = self.value()
        if not isinstance(value, dict):
            raise self._fault(f"expected a JSON object, found {describe(value)}", start)
        return value

    def end(self) -> None:
        """Check that nothing follows.

        Raises:
            DataError: Something does.
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
        """`file:line:column`; lines are counted on from the last place asked for, which never lies further on."""
        self._line += self._text.count("\n", self._line_start, position)
        self._line_start = self._text.rfind("\n", 0, position) + 1
        return f"{self._file}:{self._line}:{position - self._line_start + 1}"


def json_value(text: str) -> Any:
    """What a text in a cell says, read as strictly as a file.

    Raises:
        ValueError: It is not JSON, and why.
    """
    cursor = JsonCursor(text, file="", line=1, hint="")
    try:
        value = cursor.value()
        cursor.end()
    except DataError as error:
        raise ValueError(error.what) from error
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


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_without_duplicates)

"""Matching of texts around calls, with free white space, and the reading of JSON values and literals in an answer."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any


class Malformed(ValueError):
    """An answer begins a call that is not in the form of the template."""


def common_pattern(one: str, other: str) -> str:
    """A pattern of what two texts have in common, such as those around two ids."""
    if one == other:
        return pattern_of(one)
    begin = next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
    rest = min(len(one), len(other)) - begin
    ends = zip(reversed(one[len(one) - rest :]), reversed(other[len(other) - rest :]), strict=True)
    same = next((at for at, pair in enumerate(ends) if pair[0] != pair[1]), rest)
    return f"{pattern_of(one[:begin])}.*?{pattern_of(one[len(one) - same :])}"


def pattern_of(text: str) -> str:
    """A pattern of a text, in which white space may have any length, and may lie around each part."""
    return r"\s*".join(["", *map(re.escape, text.split()), ""]) or r"\s*"


def loose(text: str) -> re.Pattern[str]:
    """The compiled pattern of a text; see `pattern_of`."""
    return re.compile(pattern_of(text))


def match_end(text: str, answer: str, at: int) -> int | None:
    """The position behind a text in an answer, if the text is there."""
    found = loose(text).match(answer, at)
    return None if found is None else found.end()


def after(text: str | None, answer: str, at: int) -> int:
    """The position behind a text in an answer.

    Raises:
        Malformed: Something else is there.
    """
    end = None if text is None else match_end(text, answer, at)
    if end is None:
        raise Malformed("something else follows")
    return end


def is_end(text: str, answer: str, at: int) -> bool:
    """Whether an answer ends with a text from a position on."""
    return re.compile(rf"{pattern_of(text)}\Z").match(answer, at) is not None


def json_values(text: str, at: int = 0) -> Iterator[tuple[int, int, Any]]:
    """The JSON objects and lists in a text, outermost ones only, each with its begin and end."""
    while (found := re.compile(r"[{\[]").search(text, at)) is not None:
        try:
            value, at = _decoder().raw_decode(text, found.start())
        except (ValueError, RecursionError):
            at = found.start() + 1
            continue
        yield found.start(), at, value


def json_at(text: str, at: int) -> tuple[Any, int]:
    """The JSON value at a position, after white space, and its end.

    Raises:
        Malformed: There is none.
    """
    begin = at + len(text[at:]) - len(text[at:].lstrip())
    try:
        value, end = _decoder().raw_decode(text, begin)
    except (ValueError, RecursionError) as error:  # answers may be nested deeper than Python's stack
        raise Malformed("this is no JSON") from error
    return value, end


def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_without_repeated_keys)


def _refuse_constant(name: str) -> None:
    raise ValueError(name)  # Python reads NaN and Infinity, which are no JSON


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def literal(text: str) -> Any:
    """A value as JSON or as a literal of Python.

    Raises:
        ValueError: It is neither.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise ValueError("this is no literal") from error

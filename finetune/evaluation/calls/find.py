"""The form in which a chat template writes tool calls, found by rendering calls.

Templates write calls in one of three forms:

- JSON values with name and arguments in them: `<tool_call>{"name": "f", "arguments": {"k": 1}}</tool_call>`,
  `[TOOL_CALLS][{"name": "f", "arguments": {"k": 1}}]`;
- a name, and its arguments as one JSON object: `to=functions.f<|message|>{"k": 1}`;
- a name, and each argument by itself: `<function=f><parameter=k>1</parameter></function>`, `[f(k=1)]`.

`find_syntax` renders calls with known names and arguments and takes the text around these as the syntax. A syntax is
used only if it reads back what it was found from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from finetune.data.documents import ToolObject
from finetune.errors import FinetuneError
from finetune.evaluation.calls.syntax import CallSyntax, JsonCalls, NamedCalls, SpelledCalls
from finetune.evaluation.calls.text import Malformed, common_pattern, json_values, pattern_of

Render = Callable[[Sequence[ToolObject]], str]
"""The text of an answer that makes these calls and says nothing else."""

NAME, OTHER_NAME = "lookupqx", "reservezv"
KEY, OTHER_KEY = "keyqx", "fieldzv"
TEXT, OTHER_TEXT, NUMBER = "valueqx", "textzv", 73191

_IDS = ("k3vq8w0zp", "m7ht2y5rd", "b1xd4n6gs")
"""Ids as Mistral's templates demand them; they have no character in common at any place."""


def find_syntax(render: Render) -> CallSyntax | None:
    """The syntax of a template's calls.

    Args:
        render: Renders an answer by the template. May raise `FinetuneError`: templates refuse what they do not know.

    Returns:
        None where the template writes no calls, or writes them in none of the three forms.
    """
    for named in (False, True):
        samples = Samples(render, named)
        for find in (_json_calls, _named_calls, _spelled_calls):
            syntax = find(samples)
            if syntax is not None and samples.are_read_by(syntax):
                return syntax
    return None


class Samples:
    """Renderings of calls.

    Args:
        render: See `find_syntax`.
        named: Whether the id of a call names its function, as in templates that write the id in place of the name.
    """

    def __init__(self, render: Render, named: bool) -> None:
        self._render, self._named = render, named
        self.one = self.of([(NAME, {KEY: TEXT})])
        self.two = self.of([(NAME, {KEY: TEXT}), (OTHER_NAME, {OTHER_KEY: OTHER_TEXT})])

    def of(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> str | None:
        """The text of calls; None where the template refuses them or writes not all of them."""
        written = [self._call(index, name, arguments) for index, (name, arguments) in enumerate(calls)]
        try:
            text = self._render(written)
        except FinetuneError:
            return None
        place = 0
        for name, _ in calls:
            place = text.find(name, place)
            if place < 0:
                return None
        return text

    def are_read_by(self, syntax: CallSyntax) -> bool:
        """Whether a syntax reads calls of several kinds back."""
        kinds: list[list[tuple[str, dict[str, Any]]]] = [
            [(NAME, {KEY: TEXT})],
            [(NAME, {})],
            [(NAME, {KEY: NUMBER, OTHER_KEY: ["a", {"b": True}], "third": OTHER_TEXT})],
            [(NAME, {KEY: TEXT}), (OTHER_NAME, {}), (NAME, {OTHER_KEY: OTHER_TEXT})],
        ]
        return all(self._is_read(syntax, kind) for kind in kinds)

    def _is_read(self, syntax: CallSyntax, calls: list[tuple[str, dict[str, Any]]]) -> bool:
        text = self.of(calls)
        if text is None:  # a template that refuses several calls, or one without arguments
            return len(calls) > 1 or not calls[0][1]
        try:
            found = syntax.parse(text)
        except Malformed:
            return False
        return [(each.name, list(each.arguments)) for each in found] == [(name, list(given)) for name, given in calls]

    def _call(self, index: int, name: str, arguments: dict[str, Any]) -> ToolObject:
        id_of_call = f"functions.{name}:{index}" if self._named else _IDS[index]
        return {"type": "function", "id": id_of_call, "function": {"name": name, "arguments": arguments}}


def _json_calls(samples: Samples) -> JsonCalls | None:
    if samples.one is None:
        return None
    for begin, end, value in json_values(samples.one):
        is_list = isinstance(value, list)
        item = value[0] if is_list and value else value
        name = _path(item, lambda found: found == NAME)
        arguments = _path(item, _is_arguments)
        if name and arguments:
            between = _between_values(samples.two, is_list)
            return JsonCalls(samples.one[:begin], between, samples.one[end:], is_list, name, arguments)
    return None


def _between_values(text: str | None, is_list: bool) -> str | None:
    """The text between the values of two calls; None where they are one list, or the template writes one call only."""
    values = [each for each in json_values(text or "") if isinstance(each[2], list) is is_list]
    return text[values[0][1] : values[1][0]] if text is not None and len(values) > 1 else None


def _named_calls(samples: Samples) -> NamedCalls | None:
    first = _name_and_arguments(samples.one, NAME, {KEY: TEXT}, 0)
    if samples.one is None or first is None:
        return None
    name, begin, end = first
    middle, between = samples.one[name + len(NAME) : begin], None
    pattern = pattern_of(middle)
    pair = _name_and_arguments(samples.two, NAME, {KEY: TEXT}, 0)
    other = pair and _name_and_arguments(samples.two, OTHER_NAME, {OTHER_KEY: OTHER_TEXT}, pair[2])
    if samples.two is not None and pair and other:
        between = samples.two[pair[2] : other[0]]
        pattern = common_pattern(middle, samples.two[other[0] + len(OTHER_NAME) : other[1]])
    return NamedCalls(samples.one[:name], between, samples.one[end:], pattern)


def _name_and_arguments(text: str | None, name: str, arguments: Any, at: int) -> tuple[int, int, int] | None:
    """Where a name begins, and where the JSON object behind it begins and ends."""
    place = -1 if text is None else text.find(name, at)
    if text is None or place < 0:
        return None
    values = ((begin, end) for begin, end, value in json_values(text, place) if value == arguments)
    found = next(values, None)
    return None if found is None else (place, *found)


def _spelled_calls(samples: Samples) -> SpelledCalls | None:
    one, number = samples.one, samples.of([(NAME, {KEY: NUMBER})])
    without = samples.of([(NAME, {})])
    if one is None or number is None or without is None:
        return None
    text_parts, number_parts = (_split(each, NAME, KEY, value) for each, value in ((one, TEXT), (number, str(NUMBER))))
    if text_parts is None or number_parts is None:
        return None
    before, opening, equals, after = number_parts
    left, right = text_parts[2].removeprefix(equals), text_parts[3].removesuffix(after)
    if equals + left != text_parts[2] or right + after != text_parts[3]:
        return None
    pair = samples.of([(NAME, {KEY: NUMBER, OTHER_KEY: NUMBER + 1})])
    comma = None if pair is None else _between(pair, str(NUMBER), OTHER_KEY)
    calls = samples.of([(NAME, {KEY: NUMBER}), (OTHER_NAME, {OTHER_KEY: NUMBER + 1})])
    empty = samples.of([(NAME, {}), (OTHER_NAME, {})])
    return SpelledCalls(
        before=before,
        between=None if calls is None else _between(calls, str(NUMBER), OTHER_NAME),
        after=after,
        opening=opening,
        equals=equals,
        comma=comma,
        quotes=(left, right),
        without=without[without.index(NAME) + len(NAME) :],
        without_between=None if empty is None else _between(empty, NAME, OTHER_NAME),
    )


def _split(text: str, *parts: str) -> list[str] | None:
    """The texts before, between and after parts that follow one another; None where one is missing."""
    pieces, at = [], 0
    for part in parts:
        place = text.find(part, at)
        if place < 0:
            return None
        pieces.append(text[at:place])
        at = place + len(part)
    return [*pieces, text[at:]]


def _between(text: str, first: str, second: str) -> str | None:
    pieces = _split(text, first, second)
    return None if pieces is None else pieces[1]


def _path(value: Any, is_wanted: Callable[[Any], bool]) -> tuple[str, ...] | None:
    """The keys in nested objects that lead to a value."""
    if not isinstance(value, dict):
        return None
    for key, inner in value.items():
        if is_wanted(inner):
            return (key,)
        if (path := _path(inner, is_wanted)) is not None:
            return (key, *path)
    return None


def _is_arguments(value: Any) -> bool:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    return bool(value == {KEY: TEXT})

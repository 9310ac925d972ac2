"""The forms in which chat templates write tool calls, and the reading of answers by them.

White space between the parts of a call is free, as it is for the parsers of inference engines; anything else that
differs makes an answer malformed.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.evaluation.calls.text import Malformed, after, is_end, json_at, literal, loose, match_end, pattern_of

_KEY = r"[^\n\"'<>(){}\[\]]+?"
_NAME = r"[^\s\"'<>(){}\[\],]+?"
_FIRST_MARK = re.compile(r"<[^>]*>|\[[A-Z_]+\]|\S+")


@dataclass(frozen=True)
class Literal:
    """An argument that a template writes without its type: the text `5` may be a text or a number."""

    text: str


@dataclass(frozen=True)
class Call:
    """A call of a tool.

    Attributes:
        name: Name of the tool.
        arguments: Its arguments: JSON values, or `Literal`.
    """

    name: str
    arguments: dict[str, Any]


class CallSyntax(ABC):
    """A form of calls.

    Attributes:
        before: Text before the first call.
        between: Text between two calls; None where the template writes one call at most.
        after: Text after the last call.
    """

    before: str
    between: str | None
    after: str

    def parse(self, answer: str) -> list[Call]:
        """The calls of an answer; none where it makes none. Text before the first call is allowed, text behind is not.

        Raises:
            Malformed: It begins a call that is not in the form of the template.
        """
        begin = self._begin(answer)
        if begin is None:
            return []
        found = loose(self.before).match(answer, begin)
        if found is None:
            raise Malformed("the beginning of the call has another form")
        return self._calls(answer, found.end())

    @abstractmethod
    def _calls(self, text: str, at: int) -> list[Call]:
        """The calls in a text from a position through the end of the text.

        Raises:
            Malformed: They have another form.
        """

    def _begin(self, answer: str) -> int | None:
        """Where the first call begins; None where there is none."""
        mark = _FIRST_MARK.match(self.before.strip())
        if mark is not None and len(re.findall(r"\w", mark.group())) > 2:
            place = answer.find(mark.group())
            return None if place < 0 else place
        # Without a mark of its own a call can only be the whole answer, which begins as JSON or in a bracket.
        begin = len(answer) - len(answer.lstrip())
        return begin if self._may_begin(answer[begin:]) else None

    def _may_begin(self, answer: str) -> bool:
        """Whether an answer without white space around it begins a call, in a syntax without a mark before calls."""
        opening = self.before.strip()
        return bool(opening) and answer.startswith(opening)


@dataclass(frozen=True)
class JsonCalls(CallSyntax):
    """Calls as JSON values, each with name and arguments, or lists of them.

    Attributes:
        is_list: Whether a value is a list of calls.
        name: Keys that lead to the name.
        arguments: Keys that lead to the arguments, which may be JSON text.
    """

    before: str
    between: str | None
    after: str
    is_list: bool
    name: tuple[str, ...]
    arguments: tuple[str, ...]

    def _calls(self, text: str, at: int) -> list[Call]:
        calls: list[Call] = []
        while True:
            value, at = json_at(text, at)
            if isinstance(value, list) is not self.is_list or not value:
                raise Malformed("the call is a JSON value of another form")
            calls += map(self._call, value if self.is_list else [value])
            if is_end(self.after, text, at):
                return calls
            at = after(self.between, text, at)

    def _call(self, value: Any) -> Call:
        name, arguments = _follow(value, self.name), _follow(value, self.arguments)
        if isinstance(arguments, str):
            arguments, _ = json_at(arguments, 0)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise Malformed("the call lacks its name or its arguments")
        return Call(name, arguments)

    def _may_begin(self, answer: str) -> bool:
        return answer.startswith("[" if self.is_list else "{")


@dataclass(frozen=True)
class NamedCalls(CallSyntax):
    """Calls as a name, and arguments as one JSON object.

    Attributes:
        middle: Pattern of the text between name and arguments.
    """

    before: str
    between: str | None
    after: str
    middle: str

    def _calls(self, text: str, at: int) -> list[Call]:
        calls: list[Call] = []
        head = re.compile(rf"({_NAME}){self.middle}(?=\s*\{{)", re.DOTALL)
        while True:
            if (found := head.match(text, at)) is None:
                raise Malformed("the call lacks its name or its arguments")
            arguments, at = json_at(text, found.end())
            calls.append(Call(found[1], arguments))
            if is_end(self.after, text, at):
                return calls
            at = after(self.between, text, at)


@dataclass(frozen=True)
class SpelledCalls(CallSyntax):
    """Calls as a name, and each argument as a key and a value.

    Attributes:
        opening: Between name and first key.
        equals: Between key and value.
        comma: Between value and next key; None where a call has one argument at most.
        quotes: Around a text; two empty texts where a text has no signs around it.
        without: Between name and end of the answer in a call without arguments.
        without_between: Between such a call's name and the next name; None as in `between`.
    """

    before: str
    between: str | None
    after: str
    opening: str
    equals: str
    comma: str | None
    quotes: tuple[str, str]
    without: str
    without_between: str | None

    def _calls(self, text: str, at: int) -> list[Call]:
        calls: list[Call] = []
        follow = "|".join(pattern_of(each) for each in (self.opening, self.without, self.without_between) if each)
        head = re.compile(rf"\s*({_NAME})(?={follow})", re.DOTALL)
        while True:
            if (found := head.match(text, at)) is None:
                raise Malformed("the call lacks its name")
            at = found.end()
            if is_end(self.without, text, at):
                return [*calls, Call(found[1], {})]
            if self.without_between is not None and (end := match_end(self.without_between, text, at)) is not None:
                calls.append(Call(found[1], {}))
                at = end
                continue
            arguments, at, is_last = self._arguments(text, after(self.opening, text, at))
            calls.append(Call(found[1], arguments))
            if is_last:
                return calls

    def _arguments(self, text: str, at: int) -> tuple[dict[str, Any], int, bool]:
        """The arguments from the first key on, the position behind them, and whether the answer ends there."""
        arguments: dict[str, Any] = {}
        key_pattern = re.compile(rf"\s*({_KEY}){pattern_of(self.equals)}")
        while True:
            if (key := key_pattern.match(text, at)) is None or key[1] in arguments:
                raise Malformed("an argument lacks its key, or has it twice")
            arguments[key[1]], at, sign = self._value(text, key.end())
            if sign != "comma":
                return arguments, at, sign == "after"

    def _value(self, text: str, at: int) -> tuple[Any, int, str]:
        """A value, the position behind the sign that ends it, and the name of that sign."""
        for end, behind, sign in self._signs(text, at):
            try:
                return self._of_text(text[at:end]), behind, sign
            except ValueError:  # the sign is a part of the value
                continue
        raise Malformed("an argument does not end")

    def _signs(self, text: str, at: int) -> Iterator[tuple[int, int, str]]:
        """The signs that may end a value: begin, end and name. A comma counts where a key follows it."""
        patterns = {"after": rf"{pattern_of(self.after)}\Z"}
        if self.comma is not None:
            patterns["comma"] = rf"{pattern_of(self.comma)}(?={_KEY}{pattern_of(self.equals)})"
        if self.between is not None:
            patterns["between"] = pattern_of(self.between)
        pattern = re.compile("|".join(f"(?P<{name}>{each})" for name, each in patterns.items()))
        while (found := pattern.search(text, at)) is not None:
            yield found.start(), found.end(), str(found.lastgroup)
            at = found.start() + 1

    def _of_text(self, written: str) -> Any:
        left, right = self.quotes
        if not left:
            return Literal(written.strip())
        written = written.strip()
        if left in ('"', "'"):
            return literal(written)
        inner = written.removeprefix(left)
        if inner != written:
            if not inner.endswith(right):
                raise ValueError("the text does not end")
            return inner.removesuffix(right)
        return literal(written)


def _follow(value: Any, path: Sequence[str]) -> Any:
    for key in path:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value

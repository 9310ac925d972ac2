"""Parts of a conversation that a chat template leaves out of its text.

Every string of the conversation is put between marks, and the marked conversation is rendered as well. Where the two
texts differ in nothing but the marks, a part whose marks are missing is not in the text, whatever the other messages
say. The few templates whose control flow depends on the words of a message get a search of all parts in their order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from finetune.data.documents import Conversation, Message, ToolObject
from finetune.data.thoughts import THOUGHT_TAGS

Kind = Literal["content", "reasoning", "name", "call", "argument", "tool", "key"]

# Characters of a private use area: no text has them, no template strips or escapes them.
BEGIN, SEPARATOR, END = "\ue000", "\ue001", "\ue002"
FIRST_NUMBER = 7_310_000_000
"""Numbers from here on stand for the numbers in a call's arguments."""

_TAG = re.compile(r"(</?[^<>\s]{1,40}>|\[/?[A-Z_]+\]|◁/?\w+▷|<\|\w+\|>)")
_CLOSING = re.compile("|".join(re.escape(end) for _, end in THOUGHT_TAGS))
_MARKED = re.compile(f"{BEGIN}(\\d+){SEPARATOR}(.*?){END}", re.DOTALL)
_WORD = re.compile(r"\w+")
_MARK = re.compile(f"{BEGIN}\\d+{SEPARATOR}|{END}")


@dataclass(frozen=True)
class Part:
    """A part of a conversation, without white space around it.

    Attributes:
        turn: Index of its message; -1 for the definition of a tool.
        kind: What it is of the message; `key` is a further key such as `name`.
        text: Its text, or the JSON text of a number.
        key: Name of the key, of that kind.
    """

    turn: int
    kind: Kind
    text: str
    key: str = ""

    @cached_property
    def forms(self) -> tuple[str, ...]:
        """The text as it is, and as a part of a JSON string, once or twice over."""
        plain, ascii_only = (json.dumps(self.text, ensure_ascii=escapes)[1:-1] for escapes in (False, True))
        return self.text, plain, ascii_only, json.dumps(plain, ensure_ascii=False)[1:-1]

    def is_shown_in(self, text: str) -> bool:
        """Whether a rendering shows the part: as one of its forms, or all of its words with others between them.

        Templates that indent lines, or begin each with a mark of a comment, put something between words.
        """
        if text in self.forms:
            return True
        words = iter(_WORD.findall(text))
        return all(word in words for word in _WORD.findall(self.text)) and bool(_WORD.search(self.text))


def omitted_parts(
    conversation: Conversation, text: str, render: Callable[[Conversation], str], switches: Sequence[str] = ()
) -> list[Part]:
    """The parts of a conversation that are not in its rendered text.

    Args:
        conversation: A conversation.
        text: Its rendering.
        render: Renders a conversation; may raise any exception.
        switches: Words in messages that are settings of the template, and no part of the text.
    """
    marks = _Marks(switches)
    marked = marks.conversation(conversation)
    if any(mark in text for mark in (BEGIN, SEPARATOR, END)):
        return list(_not_in_order(marks.parts, text))
    try:
        rendered = render(marked)
    except Exception:  # the template rejects the marks, for instance where it looks up a tool by its name
        return list(_not_in_order(marks.parts, text))
    if marks.removed(rendered) != text:
        return list(_not_in_order(marks.parts, text))
    found = {int(number): inner for number, inner in _MARKED.findall(rendered)}

    def is_found(number: int, part: Part) -> bool:
        if number in marks.numbers:
            return str(FIRST_NUMBER + number) in rendered
        return number in found and part.is_shown_in(found[number])

    # Some templates write the id of a call in place of its name, which is a part of the id.
    ids = {str(call.get("id")) for message in conversation.messages for call in message.tool_calls}
    names = {part.text for part in marks.parts if any(part.text in name and name in text for name in ids)}
    return [
        part
        for number, part in enumerate(marks.parts)
        if not is_found(number, part) and not (part.kind == "call" and part.text in names)
    ]


def _not_in_order(parts: list[Part], text: str) -> Iterator[Part]:
    """The parts that are missing where all are searched one after the other, each behind the one before."""
    position = 0
    for part in parts:
        if part.kind == "key":
            continue
        places = [(at, form) for form in part.forms if (at := text.find(form, position)) >= 0]
        if not places:
            yield part
            continue
        at, form = min(places)
        position = at + len(form)


@dataclass
class _Marks:
    """Puts marks around the parts of a conversation, and numbers them in the order of the text."""

    switches: Sequence[str] = ()
    parts: list[Part] = field(default_factory=list)
    numbers: set[int] = field(default_factory=set)

    def conversation(self, conversation: Conversation) -> Conversation:
        tools = tuple(self._tool(tool) for tool in conversation.tools)
        messages = tuple(self._message(turn, message) for turn, message in enumerate(conversation.messages))
        return replace(conversation, tools=tools, messages=messages)

    def removed(self, text: str) -> str:
        """A rendered text without marks, and with the numbers of the row."""
        text = _MARK.sub("", text)
        for number in self.numbers:
            text = text.replace(str(FIRST_NUMBER + number), self.parts[number].text)
        return text

    def _tool(self, tool: ToolObject) -> dict[str, Any]:
        function = dict(tool["function"])
        for key in ("name", "description"):
            if isinstance(function.get(key), str):
                function[key] = self._text(function[key], -1, "tool")
        return {**tool, "function": function}

    def _message(self, turn: int, message: Message) -> Message:
        extra = {
            key: self._text(value, turn, "key", key) if isinstance(value, str) else value
            for key, value in message.extra.items()
        }
        reasoning = self._text(message.reasoning, turn, "reasoning")
        content = self._content(turn, message)
        calls = tuple(self._call(turn, call) for call in message.tool_calls)
        return replace(message, extra=extra, reasoning=reasoning, content=content, tool_calls=calls)

    def _content(self, turn: int, message: Message) -> str:
        ends = [match.end() for match in _CLOSING.finditer(message.content)] if message.role == "assistant" else []
        thought = ends[-1] if ends else 0
        before, after = message.content[:thought], message.content[thought:]
        return self._text(before, turn, "reasoning") + self._text(after, turn, "content")

    def _call(self, turn: int, call: ToolObject) -> dict[str, Any]:
        function = dict(call["function"])
        function["name"] = self._text(function["name"], turn, "call")
        function["arguments"] = self._argument(function.get("arguments", {}), turn)
        return {**call, "function": function}

    def _argument(self, value: Any, turn: int) -> Any:
        if isinstance(value, dict):
            return {self._text(key, turn, "argument"): self._argument(each, turn) for key, each in value.items()}
        if isinstance(value, list):
            return [self._argument(each, turn) for each in value]
        if isinstance(value, str):
            return self._text(value, turn, "argument")
        if isinstance(value, int | float) and not isinstance(value, bool):
            self.numbers.add(len(self.parts))
            self.parts.append(Part(turn, "argument", json.dumps(value)))
            return FIRST_NUMBER + len(self.parts) - 1
        return value

    def _text(self, text: str, turn: int, kind: Kind, key: str = "") -> str:
        """The text with marks around each stretch between tags, inside of the white space around it."""
        return "".join(
            stretch if place % 2 else self._stretch(stretch, turn, kind, key)  # odd places are tags
            for place, stretch in enumerate(_TAG.split(text))
        )

    def _stretch(self, stretch: str, turn: int, kind: Kind, key: str) -> str:
        inner = stretch.strip()
        content = inner
        for switch in self.switches:
            content = content.replace(switch, "")
        if not content.strip():
            return stretch
        before = stretch[: len(stretch) - len(stretch.lstrip())]
        after = stretch[len(before) + len(inner) :]
        self.parts.append(Part(turn, kind, content.strip(), key))
        return f"{before}{BEGIN}{len(self.parts) - 1}{SEPARATOR}{inner}{END}{after}"

"""Messages of a row: the keys that ft interprets, and all others, which the chat template gets as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.documents import SYSTEM_ROLES, Message, ToolObject
from finetune.data.rows import describe
from finetune.data.tools import tool_calls_of
from finetune.errors import DataError

TRAIN_KEYS = {"train": True, "weight": 1}
"""Keys that include a message in the targets or exclude it, ours and OpenAI's, with their default values."""

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names of an assistant's reasoning in data sets."""

CALL_KEYS = ("tool_calls", "function_call")
"""Keys with calls, OpenAI's and its earlier one, which has a single call."""

MAY_BE_NULL = (*SYSTEM_ROLES, "assistant")
"""Roles whose text may be null: there is no system message, or no answer beside calls and thoughts."""

_INTERPRETED = frozenset({"role", "content", "tool_call_id", *TRAIN_KEYS, *CALL_KEYS})


@dataclass(frozen=True)
class TurnKeys:
    """Names of the keys of a turn with its role and its text."""

    role: str = "role"
    content: str = "content"


def read_message(
    turn: Mapping[str, Any], role: str, names: TurnKeys, key: str, where: str, content_is_call: bool = False
) -> Message:
    """The message of a turn whose role is known.

    Args:
        turn: The turn.
        role: Its role, with the name that chat templates use.
        names: Names of its keys.
        key: Place of the turn in the row.
        where: Place of the row.
        content_is_call: Whether a tool call stands in the place of the text.

    Raises:
        DataError: A key has another value than it should.
    """
    calls = _calls(turn, [names.content] if content_is_call else CALL_KEYS, key, where)
    if calls and role != "assistant":
        raise DataError(f"{key} has role {role} and calls a tool", where=where, hint="only the assistant calls tools")
    thought = _reasoning_key(turn, key, where) if role == "assistant" else None
    reasoning = turn[thought] if thought else ""
    return Message(
        role,
        "" if content_is_call else _content(turn, names.content, role, key, where),
        calls,
        turn.get("tool_call_id"),
        is_trained(turn, key, where),
        reasoning,
        _further_keys(turn, names, reasoning),
    )


def _further_keys(turn: Mapping[str, Any], names: TurnKeys, reasoning: str) -> dict[str, Any]:
    """The keys of a turn that ft does not interpret; null is the same as absent."""
    return {
        name: value
        for name, value in turn.items()
        if name not in (names.role, names.content)
        and name not in _INTERPRETED
        and value is not None
        and not (name in REASONING_KEYS and value in ("", reasoning))
    }


def is_trained(turn: Mapping[str, Any], key: str, where: str) -> bool:
    """Whether a message may have targets, by its key `train` (true or false) or `weight` (1 or 0).

    Raises:
        DataError: The key has another value.
    """
    train, weight = (default if turn.get(name) is None else turn[name] for name, default in TRAIN_KEYS.items())
    if not isinstance(train, bool):
        raise DataError(
            f"{key}.train must be true or false, found {describe(train)}", where=where, hint="write true or false"
        )
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"{key}.weight must be 0 or 1, found {describe(weight)}", where=where, hint="write 0 or 1")
    return train and weight == 1


def _calls(turn: Mapping[str, Any], names: Sequence[str], key: str, where: str) -> tuple[ToolObject, ...]:
    found = [tool_calls_of(turn[name], f"{key}.{name}", where) for name in names if turn.get(name)]
    if len(found) > 1:
        raise DataError(
            f"{key} has both {' and '.join(names)}", where=where, hint=f"remove {names[-1]}, the earlier form"
        )
    return found[0] if found else ()


def _content(turn: Mapping[str, Any], content_key: str, role: str, key: str, where: str) -> str:
    content = turn.get(content_key)
    if content is None and role in MAY_BE_NULL:
        return ""
    if role == "tool" and not _is_text(content):
        raise DataError(
            f"{key}.{content_key}, the result of a tool, must be text, found {describe(content)}",
            where=where,
            hint="write the result with json.dumps" if content is not None else "write the result, or an empty text",
        )
    if isinstance(content, list):
        return "".join(_text(part, f"{key}.{content_key}[{i}]", where) for i, part in enumerate(content))
    if not isinstance(content, str):
        raise DataError(
            f"{key}.{content_key} must be text, found {describe(content)}",
            where=where,
            hint="write a text, or an empty one where the message has no words",
        )
    return content


def _is_text(content: Any) -> bool:
    """Whether this is a text, or a list of parts of a content."""
    parts = content if isinstance(content, list) else []
    return isinstance(content, str) or (
        bool(parts) and all(isinstance(part, dict) and "type" in part for part in parts)
    )


def _text(part: Any, key: str, where: str) -> str:
    """The text of one part of a content that is a list of parts."""
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise DataError(
            f"{key} must have the type text, found {describe(part)}",
            where=where,
            hint="remove it: ft trains on text",
        )
    return text


def _reasoning_key(turn: Mapping[str, Any], key: str, where: str) -> str | None:
    """The first key with reasoning."""
    name = next((name for name in REASONING_KEYS if turn.get(name)), None)
    if name is not None and not isinstance(turn[name], str):
        raise DataError(
            f"{key}.{name} must be text, found {describe(turn[name])}", where=where, hint="write it as one text"
        )
    return name

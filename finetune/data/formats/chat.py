"""Chat: a list of messages with `role` and `content`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, get_args

from finetune.data.documents import Conversation, Format, Message, Role
from finetune.data.readers.json_cursor import json_value
from finetune.data.rows import Row, describe, excerpt
from finetune.data.tools import tool_calls_of, tools_of
from finetune.errors import DataError
from finetune.recipe.sections.data import ChatSource

ROLES = get_args(Role)
TRAIN_KEYS = {"train": True, "weight": 1}
"""Keys that include a message in the targets or exclude it, ours and OpenAI's, with their default values."""

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names of an assistant's reasoning in data sets."""


class ChatFormat(Format[ChatSource]):
    """Rows with OpenAI's chat messages."""

    def document(self, row: Row) -> Conversation:
        """The messages of the row."""
        column = self.section.messages
        values = messages_in(row, column, "{format: chat, messages: <column>}")
        messages = [_message(value, f"{column}[{i}]", row.where) for i, value in enumerate(values)]
        if self.section.answer is not None:
            messages = with_answer(messages, row, self.section.answer, _message)
        return Conversation(tuple(messages), tools_of(row, self.section.tools))


def messages_in(row: Row, column: str, section: str) -> list[Any]:
    """The list of messages in a column.

    Args:
        row: The row.
        column: Name of the column.
        section: Recipe section that would name another column, for the hint.

    Raises:
        DataError: The column is missing or contains no list.
    """
    messages = turns_value(row, column)
    if not isinstance(messages, list) or not messages:
        columns = f"no such column among: {excerpt(', '.join(row.values)) or 'none'}"
        row_has = describe(messages) if column in row.values else columns
        raise DataError(
            f"column {column!r} must be a list of messages, found {row_has}",
            where=row.where,
            hint=f"correct the row, or name its column: {section}",
        )
    return messages


def turns_value(row: Row, column: str) -> Any:
    """The value of a column of turns; JSON text is parsed, because a cell of a CSV file can only be text."""
    value = row.values.get(column)
    if isinstance(value, str):
        with suppress(ValueError):
            return json_value(value)
    return value


def with_answer(
    messages: Sequence[Message], row: Row, column: str, to_message: Callable[[Any, str, str], Message]
) -> list[Message]:
    """A conversation and its answer, which is in a column of its own.

    Args:
        messages: The prompt, which gets no targets.
        row: The row.
        column: Name of the column with the answer.
        to_message: Converts a value, its key and the place of the row to a message.

    Raises:
        DataError: The row has no answer.
    """
    value = row.values.get(column)
    if isinstance(value, (dict, list)) and value:
        parts = value if isinstance(value, list) else [value]
        answer = [to_message(part, f"{column}[{i}]", row.where) for i, part in enumerate(parts)]
    else:
        answer = [Message("assistant", row.text(column))]
    return [*(replace(message, train=False) for message in messages), *answer]


def _message(value: Any, key: str, where: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(
            f"{key} must be an object with role and content, found {describe(value)}",
            where=where,
            hint="correct the row",
        )
    role, calls = value.get("role"), value.get("tool_calls")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(
            f"{key}.role must be one of {', '.join(ROLES)}, found {describe(role)}", where=where, hint="correct the row"
        )
    if calls and role != "assistant":
        raise DataError(f"{key} has role {role} and calls a tool", where=where, hint="only the assistant calls tools")
    return Message(
        role,
        _content(value, key, where, may_be_null=bool(calls)),
        tool_calls_of(calls, f"{key}.tool_calls", where) if calls else (),
        value.get("tool_call_id"),
        is_trained(value, key, where),
        _reasoning(value, key, where) if role == "assistant" else "",
    )


def _content(value: dict[str, Any], key: str, where: str, may_be_null: bool) -> str:
    content = value.get("content")
    if content is None and may_be_null:
        return ""
    if isinstance(content, list):
        return "".join(_text(part, f"{key}.content[{i}]", where) for i, part in enumerate(content))
    if not isinstance(content, str):
        raise DataError(f"{key}.content must be text, found {describe(content)}", where=where, hint="correct the row")
    return content


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


def _reasoning(value: dict[str, Any], key: str, where: str) -> str:
    name = next((name for name in REASONING_KEYS if value.get(name) is not None), None)
    if name is None:
        return ""
    reasoning = value[name]
    if not isinstance(reasoning, str):
        raise DataError(f"{key}.{name} must be text, found {describe(reasoning)}", where=where, hint="correct the row")
    return reasoning


def is_trained(value: dict[str, Any], key: str, where: str) -> bool:
    """Whether a message may have targets, by its key `train` (true or false) or `weight` (1 or 0).

    Raises:
        DataError: The key has another value.
    """
    train, weight = (default if value.get(name) is None else value[name] for name, default in TRAIN_KEYS.items())
    if not isinstance(train, bool):
        raise DataError(
            f"{key}.train must be true or false, found {describe(train)}", where=where, hint="correct the row"
        )
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"{key}.weight must be 0 or 1, found {describe(weight)}", where=where, hint="correct the row")
    return train and weight == 1

"""Chat: a list of messages with `role` and `content`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

from finetune.data.documents import Conversation, Message, Role
from finetune.data.formats.conversation import C, ConversationFormat
from finetune.data.formats.messages import TurnKeys, read_message
from finetune.data.json_text import parsed_if_json, structured
from finetune.data.rows import Row, describe, excerpt
from finetune.data.tools import FUNCTIONS, functions_of, tools_of, with_explicit_nulls, with_tool_names
from finetune.errors import DataError
from finetune.recipe.sections.data import ChatSource

ROLES = get_args(Role)
EARLIER_ROLES = {"function": "tool"}
"""OpenAI's earlier names of roles."""


class TurnsFormat(ConversationFormat[C]):
    """A format whose rows have a list of turns, and may have tools and an answer in columns of their own."""

    def read_columns(self, row: Row) -> set[str]:
        """See the base class."""
        return super().read_columns(row) | ({FUNCTIONS} if functions_of(row) else set())

    def of_turns(
        self,
        row: Row,
        turns: Sequence[Message],
        answer: str | None,
        tools: str,
        to_message: Callable[[Any, str, str], Message],
    ) -> Conversation:
        """The conversation of a row.

        Args:
            row: The row.
            turns: Its turns.
            answer: Column with its answer, if that is separate.
            tools: Column with its tools.
            to_message: Converts a value, its key and the place of the row to a message.

        Raises:
            DataError: A column holds something else, or there is no answer.
        """
        messages = turns if answer is None else with_answer(turns, row, answer, to_message)
        definitions = tools_of(row, tools)
        messages = with_explicit_nulls(with_tool_names(messages), definitions)
        return self.conversation(row, messages, tools=definitions)


class ChatFormat(TurnsFormat[ChatSource]):
    """Rows with OpenAI's chat messages."""

    def document(self, row: Row) -> Conversation:
        """The messages of the row."""
        section = self.section
        values = messages_in(row, section.messages, "{format: chat, messages: <column>}")
        messages = [_message(value, f"{section.messages}[{i}]", row.where) for i, value in enumerate(values)]
        return self.of_turns(row, messages, section.answer, section.tools, _message)


def messages_in(row: Row, column: str, section: str) -> list[Any]:
    """The list of messages in a column.

    Args:
        row: The row.
        column: Name of the column.
        section: Recipe section that would name another column, for the hint.

    Raises:
        DataError: The column is missing or contains no list, or one that is printed text instead of JSON.
    """
    messages = structured(row, column)
    if not isinstance(messages, list) or not messages:
        columns = f"no such column among: {excerpt(', '.join(row.values)) or 'none'}"
        row_has = describe(messages) if column in row.values else columns
        raise DataError(
            f"column {column!r} must be a list of messages, found {row_has}",
            where=row.where,
            hint=f"write a list of messages, or name the column that has one: {section}",
        )
    return messages


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
    if row.typing == "none":
        as_json = parsed_if_json(value)
        parts = as_json if isinstance(as_json, list) else [as_json]
        value = as_json if all(isinstance(part, dict) for part in parts) else value
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
            hint='write {"role": "user", "content": "..."}',
        )
    role = value.get("role")
    role = EARLIER_ROLES.get(role, role) if isinstance(role, str) else role
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(
            f"{key}.role must be one of {', '.join(ROLES)}, found {describe(role)}",
            where=where,
            hint="rename the role, or let the format map it: {format: sharegpt, role_key: role, content_key: content, "
            "user_roles: [...]}",
        )
    return read_message(value, role, TurnKeys(), key, where)

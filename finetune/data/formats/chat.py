"""Chat: a list of messages with `role` and `content`."""

from __future__ import annotations

from abc import abstractmethod
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
from finetune.recipe.sections.data import ChatSource, ShareGptSource

ROLES = get_args(Role)
ROLE_KEYS = ("user_roles", "assistant_roles", "system_roles", "tool_roles")
"""Keys of a ShareGPT source with the names of roles."""

EARLIER_ROLES = {"function": "tool"}
"""OpenAI's earlier names of roles."""


class TurnsFormat(ConversationFormat[C]):
    """A format whose rows have a list of turns, and may have tools and an answer in columns of their own."""

    def read_columns(self, row: Row) -> set[str]:
        """See the base class."""
        return super().read_columns(row) | ({FUNCTIONS} if functions_of(row) else set())

    def of_turns(self, row: Row, values: Sequence[Any], column: str, answer: str | None, tools: str) -> Conversation:
        """The conversation of a row. A system message whose text is null is left out, as a null column is.

        Args:
            row: The row.
            values: Its turns.
            column: Column with the turns.
            answer: Column with its answer, if that is separate.
            tools: Column with its tools.

        Raises:
            DataError: A column holds something else, or there is no answer.
        """
        turns = [self.message(value, f"{column}[{i}]", row.where) for i, value in enumerate(values)]
        messages = [
            message
            for message, value in zip(turns, values, strict=True)
            if not message.is_system or value.get(self.keys.content) is not None
        ]
        if answer is not None:
            messages = with_answer(messages, row, answer, self.message)
        if not messages:
            raise DataError(
                f"column {column!r} has no message with a text", where=row.where, hint="write a message of the user"
            )
        definitions = tools_of(row, tools)
        messages = with_explicit_nulls(with_tool_names(messages), definitions)
        return self.conversation(row, messages, tools=definitions)

    @property
    @abstractmethod
    def keys(self) -> TurnKeys:
        """Names of the keys of a turn."""

    @abstractmethod
    def message(self, value: Any, key: str, where: str) -> Message:
        """The message of a turn.

        Args:
            value: The turn.
            key: Its place in the row, for messages.
            where: Place of the row.

        Raises:
            DataError: The turn has another form.
        """


class ChatFormat(TurnsFormat[ChatSource]):
    """Rows with OpenAI's chat messages."""

    def document(self, row: Row) -> Conversation:
        """The messages of the row."""
        section = self.section
        values = messages_in(row, section.messages, "{format: chat, messages: <column>}")
        return self.of_turns(row, values, section.messages, section.answer, section.tools)

    @property
    def keys(self) -> TurnKeys:
        """OpenAI's."""
        return TurnKeys()

    def message(self, value: Any, key: str, where: str) -> Message:
        """See the base class."""
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
                hint=f"rename the role, or let the format map it: {self._mapped(role)}",
            )
        return read_message(value, role, self.keys, key, where)

    def _mapped(self, role: object) -> str:
        """The section of a source that maps a role, for a hint."""
        keys = f"format: sharegpt, conversations: {self.section.messages}, role_key: role, content_key: content"
        lists = {key: ShareGptSource.model_fields[key].default for key in ROLE_KEYS}
        if any(role in names for names in lists.values()):
            return f"{{{keys}}}"
        own = next((key for key, names in lists.items() if str(role).lower() in names), None)
        shown = {"user_roles": "...", "assistant_roles": "..."} | ({own: excerpt(str(role))} if own else {})
        return f"{{{keys}, {', '.join(f'{key}: [{names}]' for key, names in shown.items())}}}"


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

"""Chat: a list of messages with `role` and `content`."""

from __future__ import annotations

from typing import Any, get_args

from finetune.data.documents import Conversation, Format, Message, Role
from finetune.data.sources import Row, describe, excerpt
from finetune.errors import DataError
from finetune.recipe.data import ChatSource

ROLES = get_args(Role)


class ChatFormat(Format[ChatSource]):
    """Rows in the form of OpenAI's chat messages."""

    def document(self, row: Row) -> Conversation:
        """The row's messages as they stand."""
        column = self.section.messages
        messages = row.values.get(column)
        if not isinstance(messages, list) or not messages:
            columns = f"no such column among: {excerpt(', '.join(row.values))}"
            row_has = describe(messages) if column in row.values else columns
            raise DataError(
                f"column {column!r} must be a list of messages, found {row_has}",
                where=row.where,
                hint="correct the row, or name its column: {format: chat, messages: <column>}",
            )
        return Conversation(tuple(_message(value, f"{column}[{i}]", row.where) for i, value in enumerate(messages)))


def _message(value: Any, key: str, where: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"{key} must be an object with role and content, found {describe(value)}", where=where)
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(
            f"{key}.role must be one of {', '.join(ROLES)}, found {describe(role)}", where=where, hint="correct the row"
        )
    if not isinstance(content, str):
        raise DataError(f"{key}.content must be text, found {describe(content)}", where=where, hint="correct the row")
    return Message(role, content)

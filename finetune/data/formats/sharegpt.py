"""ShareGPT: a list of turns with `from` and `value`."""

from __future__ import annotations

from typing import Any

from finetune.data.documents import Conversation, Format, Message
from finetune.data.formats.chat import is_trained, messages_in, with_answer
from finetune.data.rows import Row, describe, excerpt
from finetune.data.tools import tool_calls_of, tools_of
from finetune.errors import DataError
from finetune.recipe.sections.data import ShareGptSource


class ShareGptFormat(Format[ShareGptSource]):
    """Rows as in the ShareGPT data set; tool calls may be separate turns.

    Args:
        section: Names of columns, keys and roles.
    """

    def __init__(self, section: ShareGptSource) -> None:
        super().__init__(section)
        self._roles = {
            **dict.fromkeys(section.system_roles, "system"),
            **dict.fromkeys(section.user_roles, "user"),
            **dict.fromkeys((*section.assistant_roles, *section.call_roles), "assistant"),
            **dict.fromkeys(section.tool_roles, "tool"),
        }

    def document(self, row: Row) -> Conversation:
        """The turns of the row, with the role names of chat templates."""
        column = self.section.conversations
        turns = messages_in(row, column, "{format: sharegpt, conversations: <column>}")
        messages = [self._message(turn, f"{column}[{i}]", row.where) for i, turn in enumerate(turns)]
        if system := row.optional_text(self.section.system):
            messages.insert(0, Message("system", system))
        if self.section.answer is not None:
            messages = with_answer(messages, row, self.section.answer, self._message)
        return Conversation(tuple(messages), tools_of(row, self.section.tools))

    def _message(self, turn: Any, key: str, where: str) -> Message:
        role_key, content_key = self.section.role_key, self.section.content_key
        if not isinstance(turn, dict):
            raise DataError(
                f"{key} must be an object with {role_key} and {content_key}, found {describe(turn)}", where=where
            )
        name, content = turn.get(role_key), turn.get(content_key)
        if not isinstance(name, str) or name not in self._roles:
            raise DataError(
                f"{key}.{role_key} must be one of {excerpt(', '.join(self._roles))}, found {describe(name)}",
                where=where,
                hint="correct the row, or add the role in the source's section of the recipe",
            )
        train = is_trained(turn, key, where)
        if name in self.section.call_roles:
            return Message("assistant", "", tool_calls_of(content, f"{key}.{content_key}", where), train=train)
        if not isinstance(content, str):
            raise DataError(
                f"{key}.{content_key} must be text, found {describe(content)}", where=where, hint="correct the row"
            )
        return Message(self._roles[name], content, train=train)

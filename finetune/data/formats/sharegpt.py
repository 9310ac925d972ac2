"""ShareGPT: a list of turns with `from` and `value`."""

from __future__ import annotations

from typing import Any

from finetune.data.documents import Conversation, Message
from finetune.data.formats.chat import ROLE_KEYS, TurnsFormat, messages_in
from finetune.data.formats.messages import TurnKeys, read_message
from finetune.data.rows import Row, describe, excerpt
from finetune.errors import DataError
from finetune.recipe.sections.data import ShareGptSource


class ShareGptFormat(TurnsFormat[ShareGptSource]):
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
        section = self.section
        turns = messages_in(row, section.conversations, "{format: sharegpt, conversations: <column>}")
        return self.of_turns(row, turns, section.conversations, section.answer, section.tools)

    @property
    def keys(self) -> TurnKeys:
        """Those that the section names."""
        return TurnKeys(self.section.role_key, self.section.content_key)

    def message(self, value: Any, key: str, where: str) -> Message:
        """See the base class."""
        role_key, content_key = self.keys.role, self.keys.content
        if not isinstance(value, dict):
            raise DataError(
                f"{key} must be an object with {role_key} and {content_key}, found {describe(value)}",
                where=where,
                hint="correct the turn, or set role_key and content_key in the source's section of the recipe",
            )
        name = value.get(role_key)
        if not isinstance(name, str) or name not in self._roles:
            raise DataError(
                f"{key}.{role_key} must be one of {excerpt(', '.join(self._roles))}, found {describe(name)}",
                where=where,
                hint=f"correct the turn, or name the role in the source's section: {', '.join(ROLE_KEYS)}",
            )
        is_call = name in self.section.call_roles
        return read_message(value, self._roles[name], self.keys, key, where, is_call)

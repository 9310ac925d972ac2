"""What every format of conversations reads of a row beside its turns: system message and template arguments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeVar

from finetune.data.bad_rows import EMPTY, MARKED
from finetune.data.documents import Conversation, Format, Message, ToolObject
from finetune.data.json_text import parsed
from finetune.data.readers.json_cursor import json_value
from finetune.data.rows import Row, describe, excerpt
from finetune.errors import BadRow, DataError
from finetune.recipe.sections.data import SYSTEM_COLUMNS, ConversationSource, not_arguments

ARGUMENTS, DOCUMENTS = "chat_template_kwargs", "documents"
"""Columns with variables of the chat template, named as in `apply_chat_template`."""

MARK_COLUMNS = ("label", "kto_tag")
"""Columns that say whether an answer is good, in rows for KTO."""

C = TypeVar("C", bound=ConversationSource)


class ConversationFormat(Format[C]):
    """A format whose rows become conversations."""

    def read_columns(self, row: Row) -> set[str]:
        """See the base class."""
        columns = {ARGUMENTS, *self._system_columns(), *self._marks(row)}
        return super().read_columns(row) | (columns if _documents(row) is None else {*columns, DOCUMENTS})

    def conversation(
        self,
        row: Row,
        messages: Sequence[Message],
        *,
        system: str | None = None,
        tools: tuple[ToolObject, ...] = (),
        references: tuple[str, ...] = (),
        choices: tuple[str, ...] = (),
    ) -> Conversation:
        """The conversation of a row.

        Args:
            row: The row.
            messages: Its turns.
            system: System message of every row that has none of its own; by default the section's.
            tools: Definitions of the available tools.
            references: Accepted forms of the last answer.
            choices: Answers to choose from.

        Raises:
            BadRow: The row is marked as a bad answer.
            DataError: The row has two different system messages, template arguments that are none, or a value that
                JSON lacks.
        """
        self.refuse_marked(row)
        conversation = Conversation(
            tuple(self._with_system(row, messages, system or self.section.system)),
            tools,
            references,
            choices,
            template_arguments(row),
        )
        if row.typing == "by_column":
            _refuse_values_without_json(conversation, row)
        return conversation

    def refuse_marked(self, row: Row) -> None:
        """Refuse an answer that its row marks as bad, as rows for KTO do: training would make it more likely.

        Raises:
            BadRow: The row has such a mark.
        """
        for column, is_good in self._marks(row).items():
            if not is_good:
                raise BadRow(
                    f"the row marks its answer as bad: {column} is false",
                    reason=MARKED,
                    where=row.where,
                    hint="leave such rows out with data.on_bad_row: drop, or remove the column if it means "
                    "something else",
                )

    def _marks(self, row: Row) -> dict[str, bool]:
        """Columns that mark the answer of a row as good or bad, and that the format does not read as data."""
        found = {column: _truth(row.values[column]) for column in MARK_COLUMNS if column in row.values}
        return {
            column: mark for column, mark in found.items() if mark is not None and column not in self._named_columns
        }

    def _with_system(self, row: Row, messages: Sequence[Message], default: str | None) -> list[Message]:
        """The turns after the row's system message, which is in a column or the first of them."""
        texts = {column: row.optional_text(column) for column in self._system_columns()}
        own = {place: text for place, text in texts.items() if text.strip()}
        first, *rest = messages
        if first.is_system:
            own |= {"its first message": first.content} if first.content.strip() else {}
        if len(set(own.values())) > 1:
            raise DataError(
                f"the row has different system messages: {' and '.join(own)}",
                where=row.where,
                hint="leave one of them out, or name the column to use: system_column in the source's section",
            )
        if first.is_system and (first.content.strip() or not own):
            return [first, *rest]
        text: str | None = next(iter(own.values()), default)
        system = [Message("system", text)] if text else []
        return [*system, *(rest if first.is_system else messages)]

    def _system_columns(self) -> tuple[str, ...]:
        column = self.section.system_column
        return SYSTEM_COLUMNS if column == SYSTEM_COLUMNS[0] else (column,)


def _truth(value: object) -> bool | None:
    """A truth value, also as text of a CSV file; None for anything else."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def _refuse_values_without_json(conversation: Conversation, row: Row) -> None:
    """Refuse binary data and infinity in tools, calls and the like: templates render them as `<bytes>` or `Infinity`.

    Columns of Parquet and Arrow files can hold them; other files cannot.
    """
    of_messages = [(message.tool_calls, dict(message.extra)) for message in conversation.messages]
    try:
        json.dumps([conversation.tools, dict(conversation.template_arguments), of_messages], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            "the tools, calls or further keys of the row hold binary data or an infinite number, which JSON lacks",
            where=row.where,
            hint="write the column again with text in their place",
        ) from error


def template_arguments(row: Row) -> dict[str, Any]:
    """The variables that a row sets for the chat template.

    Raises:
        DataError: The column is no object, or a name in it cannot be a variable.
    """
    value = row.values.get(ARGUMENTS)
    arguments = parsed(value, f"column {ARGUMENTS!r}", row.where) if value else {}
    if not isinstance(arguments, dict):
        raise DataError(
            f"column {ARGUMENTS!r} must be an object, found {describe(value)}",
            where=row.where,
            hint='write the variables of the chat template, such as {"enable_thinking": false}',
        )
    if names := not_arguments(arguments):
        raise DataError(
            f"column {ARGUMENTS!r}: {excerpt(', '.join(map(repr, names)))} cannot be a variable of the chat template",
            where=row.where,
            hint="remove it: the row's messages and tools have columns of their own",
        )
    documents = _documents(row)
    return arguments if documents is None else {**arguments, DOCUMENTS: documents}


def answer_text(text: str, column: str, row: Row) -> str:
    """The text of an answer, which is not empty.

    Args:
        text: The answer.
        column: Its column.
        row: Its row.

    Raises:
        BadRow: It is empty, or white space only.
    """
    if not text.strip():
        raise BadRow(
            f"the answer in column {column!r} is empty",
            reason=EMPTY,
            where=row.where,
            hint="give it a text, or remove the row",
        )
    return text


def _documents(row: Row) -> list[Any] | None:
    """The documents of a row, for templates of retrieval; None where the column is no list."""
    value = row.values.get(DOCUMENTS)
    if isinstance(value, str):
        with suppress(ValueError):  # any other text is no list of documents
            value = json_value(value)
    return value if isinstance(value, list) and value else None

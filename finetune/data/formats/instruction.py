"""Instruction: an instruction, an optional input and the output, as one exchange."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.data.bad_rows import MALFORMED
from finetune.data.documents import Conversation, Message
from finetune.data.formats.conversation import ConversationFormat, answer_text
from finetune.data.json_text import structured
from finetune.data.rows import Row, describe
from finetune.errors import BadRow, DataError
from finetune.recipe.sections.data import InstructionSource


class InstructionFormat(ConversationFormat[InstructionSource]):
    """Rows as in the Alpaca data set."""

    def document(self, row: Row) -> Conversation:
        """The instruction, with its input, as the user's turn and the output as the assistant's."""
        section = self.section
        instruction, given = row.text(section.instruction), row.optional_text(section.input)
        if not given and section.needs_input:
            raise BadRow(
                "the row has no input, and the template has no text for such rows",
                reason=MALFORMED,
                where=row.where,
                hint="set template_without_input for the source: a text without {input}",
            )
        answer = answer_text(row.text(section.output), section.output, row)
        messages = [*self._history(row), Message("user", instruction, input=given), Message("assistant", answer)]
        return self.conversation(row, messages)

    def _history(self, row: Row) -> Iterator[Message]:
        column = self.section.history
        exchanges = structured(row, column)
        if exchanges not in (None, "") and not isinstance(exchanges, list):
            raise _bad_history(column, exchanges, row)
        for exchange in exchanges or []:
            if not (isinstance(exchange, list) and [type(text) for text in exchange] == [str, str]):
                raise _bad_history(column, exchange, row)
            yield Message("user", exchange[0])
            yield Message("assistant", exchange[1])


def _bad_history(column: str, found: object, row: Row) -> DataError:
    return DataError(
        f"column {column!r} must be a list of pairs of texts, found {describe(found)}",
        where=row.where,
        hint='write pairs, such as [["Hi", "Hello"]], or name the column that has them: {history: <column>}',
    )

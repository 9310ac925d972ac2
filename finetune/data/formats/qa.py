"""Question and answers, with an optional context."""

from __future__ import annotations

from typing import Any

from finetune.data.bad_rows import EMPTY
from finetune.data.documents import Conversation, Message
from finetune.data.formats.conversation import ConversationFormat, answer_text
from finetune.data.json_text import structured
from finetune.data.rows import Row, describe
from finetune.errors import BadRow, DataError
from finetune.recipe.sections.data import QaSource


class QaFormat(ConversationFormat[QaSource]):
    """Rows as in SQuAD and similar data sets."""

    def document(self, row: Row) -> Conversation:
        """The context and the question below it as the user's turn, the first answer as the assistant's."""
        section = self.section
        context, question = row.optional_text(section.context), row.text(section.question)
        answers = self._answers(row)
        user = f"{context}\n\n{question}" if context else question
        answer = answer_text(answers[0], section.answers, row)
        messages = [Message("user", user), Message("assistant", answer)]
        return self.conversation(row, messages, references=answers)

    def _answers(self, row: Row) -> tuple[str, ...]:
        column = self.section.answers
        found = _found(row, column)
        if column not in row.values or isinstance(found, str):
            return (row.text(column),)
        answers = found.get("text") if isinstance(found, dict) else found
        if answers == []:
            raise BadRow(
                f"column {column!r} has no answer",
                reason=EMPTY,
                where=row.where,
                hint="give it one, or remove the row",
            )
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise DataError(
                f"column {column!r} must contain answers, found {describe(found)}",
                where=row.where,
                hint=_hint(found),
            )
        return tuple(answers)


def _found(row: Row, column: str) -> Any:
    """The value of the column; a cell of a CSV file is a list of answers where it is JSON for one.

    An object in a cell that is not like SQuAD's is the text of an answer, as in rows of extraction.
    """
    if row.typing != "none":
        return row.values.get(column)
    found = structured(row, column)
    return row.values[column] if isinstance(found, dict) and not isinstance(found.get("text"), list) else found


def _hint(found: object) -> str:
    if type(found) is int:
        return "if the number is the index of a choice, set format: multiple_choice and the column of choices"
    return 'write a text, a list of texts, or {"text": [...]}'

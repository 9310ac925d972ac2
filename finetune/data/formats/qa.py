"""Question and answers, with an optional context."""

from __future__ import annotations

from finetune.data.documents import Conversation, Format, Message
from finetune.data.rows import Row, describe
from finetune.errors import DataError
from finetune.recipe.sections.data import QaSource


class QaFormat(Format[QaSource]):
    """Rows as in SQuAD and similar data sets."""

    def document(self, row: Row) -> Conversation:
        """The context and the question below it as the user's turn, the first answer as the assistant's."""
        section = self.section
        context, question = row.optional_text(section.context), row.text(section.question)
        answers = self._answers(row)
        user = f"{context}\n\n{question}" if context else question
        messages = [Message("user", user), Message("assistant", answers[0])]
        if section.system is not None:
            messages.insert(0, Message("system", section.system))
        return Conversation(tuple(messages), references=answers)

    def _answers(self, row: Row) -> tuple[str, ...]:
        column = self.section.answers
        found = row.values.get(column)
        if column not in row.values or isinstance(found, str):
            return (row.text(column),)
        answers = found.get("text") if isinstance(found, dict) else found
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            raise DataError(
                f"column {column!r} must contain at least one answer, found {describe(found)}",
                where=row.where,
                hint=_hint(found),
            )
        return tuple(answers)


def _hint(found: object) -> str:
    if type(found) is int:
        return "if the number is the index of a choice, set format: multiple_choice and the column of choices"
    return 'write a text, a list of texts, or {"text": [...]}'

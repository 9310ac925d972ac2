"""Multiple choice: a question with lettered choices, one of which is right."""

from __future__ import annotations

from string import ascii_uppercase
from typing import Any, TypeGuard

from finetune.data.documents import Conversation, Message
from finetune.data.formats.conversation import ConversationFormat, answer_text
from finetune.data.json_text import structured
from finetune.data.rows import LabelName, Row, describe, excerpt
from finetune.errors import DataError
from finetune.recipe.sections.data import MultipleChoiceSource


class MultipleChoiceFormat(ConversationFormat[MultipleChoiceSource]):
    """Rows as in MMLU, ARC and similar data sets."""

    def document(self, row: Row) -> Conversation:
        """The question and its choices below it as the user's turn, the right one as the assistant's."""
        section = self.section
        context, question = row.optional_text(section.context), row.text(section.question)
        found = structured(row, section.choices)
        texts, labels = self._choices(row, found)
        right = self._right(row, texts, labels, has_labels=isinstance(found, dict))
        choices = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
        user = "\n\n".join(part for part in (context, question, choices) if part)
        answers = labels if section.answer_with == "letter" else texts
        answer = answer_text(answers[right], section.choices, row)
        messages = [Message("user", user), Message("assistant", answer)]
        return self.conversation(row, messages, references=(answer,), choices=tuple(answers))

    def _choices(self, row: Row, found: Any) -> tuple[list[str], list[str]]:
        """The texts of the choices, and their labels: letters unless the row has its own."""
        texts = found.get("text") if isinstance(found, dict) else found
        if not _are_texts(texts):
            raise self._bad_choices(row)
        if len(texts) > len(ascii_uppercase) and not isinstance(found, dict):
            raise DataError(
                f"column {self.section.choices!r} has {len(texts)} choices, more than there are letters",
                where=row.where,
                hint='give them labels of their own, {"text": [...], "label": [...]}, or leave choices out',
            )
        labels = found.get("label") if isinstance(found, dict) else list(ascii_uppercase[: len(texts)])
        if not _are_texts(labels) or not len(texts) == len(labels) == len(set(labels)):
            raise self._bad_choices(row)
        return texts, labels

    def _bad_choices(self, row: Row) -> DataError:
        column = self.section.choices
        has = f"found {describe(row.values[column])}" if column in row.values else "found no such column"
        return DataError(
            f"column {column!r} must contain choices, {has}",
            where=row.where,
            hint='write a list of texts, or {"text": [...], "label": [...]}, or name its column: '
            "{format: multiple_choice, choices: <column>}",
        )

    def _right(self, row: Row, texts: list[str], labels: list[str], has_labels: bool) -> int:
        """Index of the correct choice."""
        answer = row.values.get(self.section.answer)
        index = int(answer) if isinstance(answer, str) and answer.isdecimal() else None
        if index is not None and answer not in (*texts, *labels):
            answer = index  # a cell of a CSV file can only be text
        if type(answer) is int and 0 <= answer < len(texts):
            return answer
        # A label of one choice can be the text of another: the labels 1 to 4 of numbers, for instance. Labels that the
        # row gives itself take precedence; otherwise such an answer is ambiguous.
        matches = {index for index, names in enumerate(zip(texts, labels, strict=True)) if answer in names}
        if has_labels and answer in labels:
            matches = {labels.index(answer)}
        elif row.typing == "none" and index is not None and index < len(texts):
            matches.add(index)  # "1" in a cell is the text of a choice, or the number of another
        if len(matches) != 1 and isinstance(answer, LabelName) and 0 <= answer.number < len(texts):
            return answer.number
        if len(matches) != 1:
            kind = "more than one" if matches else "none"
            raise DataError(
                f"column {self.section.answer!r} must name one of {len(texts)} choices, "
                f"found {describe(answer)}, which matches {kind} of {excerpt(', '.join(texts))}",
                where=row.where,
                hint="write its number from 0, its letter or its text, or name the column: "
                "{format: multiple_choice, answer: <column>}",
            )
        return matches.pop()


def _are_texts(values: Any) -> TypeGuard[list[str]]:
    return isinstance(values, list) and bool(values) and all(isinstance(value, str) for value in values)

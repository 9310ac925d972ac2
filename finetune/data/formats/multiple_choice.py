"""Multiple choice: a question with lettered choices, one of which is right."""

from __future__ import annotations

from string import ascii_uppercase
from typing import Any, TypeGuard

from finetune.data.documents import Conversation, Format, Message
from finetune.data.rows import Row, describe, excerpt
from finetune.errors import DataError
from finetune.recipe.sections.data import MultipleChoiceSource


class MultipleChoiceFormat(Format[MultipleChoiceSource]):
    """Rows in the form of MMLU, ARC and their relatives."""

    def document(self, row: Row) -> Conversation:
        """The question and its choices below it as the user's turn, the right one as the assistant's."""
        section = self.section
        context, question = row.optional_text(section.context), row.text(section.question)
        texts, labels = self._choices(row)
        right = self._right(row, texts, labels)
        choices = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
        user = "\n\n".join(part for part in (context, question, choices) if part)
        answers = labels if section.answer_with == "letter" else texts
        answer = answers[right]
        messages = [Message("user", user), Message("assistant", answer)]
        if section.system is not None:
            messages.insert(0, Message("system", section.system))
        return Conversation(tuple(messages), references=(answer,), choices=tuple(answers))

    def _choices(self, row: Row) -> tuple[list[str], list[str]]:
        """The texts of the choices, and the label of each."""
        found = row.values.get(self.section.choices)
        texts = found.get("text") if isinstance(found, dict) else found
        if not _are_texts(texts):
            raise self._bad_choices(row)
        if len(texts) > len(ascii_uppercase):
            raise DataError(
                f"column {self.section.choices!r} has {len(texts)} choices, more than there are letters",
                where=row.where,
                hint="correct the row",
            )
        labels = found.get("label") if isinstance(found, dict) else list(ascii_uppercase[: len(texts)])
        if not _are_texts(labels) or not len(texts) == len(labels) == len(set(labels)):
            raise self._bad_choices(row)
        return texts, labels

    def _bad_choices(self, row: Row) -> DataError:
        column = self.section.choices
        has = f"found {describe(row.values[column])}" if column in row.values else "the row has none"
        return DataError(
            f"column {column!r} must hold choices, {has}",
            where=row.where,
            hint='write a list of texts, or {"text": [...], "label": [...]}, or name its column: '
            "{format: multiple_choice, choices: <column>}",
        )

    def _right(self, row: Row, texts: list[str], labels: list[str]) -> int:
        """Place of the right choice."""
        answer = row.values.get(self.section.answer)
        if type(answer) is int and 0 <= answer < len(texts):
            return answer
        places = {place for place, names in enumerate(zip(texts, labels, strict=True)) if answer in names}
        if isinstance(row.values[self.section.choices], dict) and answer in labels:  # the row's own labels decide
            places = {labels.index(answer)}
        if len(places) != 1:
            kind = "more than one" if places else "none"
            raise DataError(
                f"column {self.section.answer!r} must name one of {len(texts)} choices, "
                f"found {describe(answer)}, which names {kind} of {excerpt(', '.join(texts))}",
                where=row.where,
                hint="write its number from 0, its letter or its text, or name the column: "
                "{format: multiple_choice, answer: <column>}",
            )
        return places.pop()


def _are_texts(values: Any) -> TypeGuard[list[str]]:
    return isinstance(values, list) and bool(values) and all(isinstance(value, str) for value in values)

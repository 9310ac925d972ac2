"""Multiple choice: a question with lettered choices, one of which is right."""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, TypeGuard

from finetune.data.documents import Conversation, Message
from finetune.data.formats.conversation import ConversationFormat, answer_text
from finetune.data.json_text import parsed
from finetune.data.rows import Row, describe, excerpt
from finetune.errors import DataError
from finetune.recipe.sections.data import MultipleChoiceSource


@dataclass(frozen=True)
class _Choices:
    """The choices of a row.

    Attributes:
        texts: Their texts.
        labels: Their labels: letters, unless the row has its own.
        has_own_labels: Whether it has.
    """

    texts: list[str]
    labels: list[str]
    has_own_labels: bool


class MultipleChoiceFormat(ConversationFormat[MultipleChoiceSource]):
    """Rows as in MMLU, ARC and similar data sets."""

    def document(self, row: Row) -> Conversation:
        """The question and its choices below it as the user's turn, the right one as the assistant's."""
        section = self.section
        context, question = row.optional_text(section.context), row.text(section.question)
        choices = self._choices(row)
        listed = "\n".join(f"{label}. {text}" for label, text in zip(choices.labels, choices.texts, strict=True))
        user = "\n\n".join(part for part in (context, question, listed) if part)
        answers = choices.labels if section.answer_with == "letter" else choices.texts
        answer = answer_text(answers[self._right(row, choices)], section.choices, row)
        messages = [Message("user", user), Message("assistant", answer)]
        return self.conversation(row, messages, system=section.system, references=(answer,), choices=tuple(answers))

    def _choices(self, row: Row) -> _Choices:
        column = self.section.choices
        found = parsed(row.values.get(column), f"column {column!r}", row.where)
        texts = found.get("text") if isinstance(found, dict) else found
        if not _are_texts(texts):
            raise self._bad_choices(row)
        if isinstance(found, dict):
            labels = found.get("label")
        elif len(texts) <= len(ascii_uppercase):
            labels = list(ascii_uppercase[: len(texts)])
        else:
            raise DataError(
                f"column {column!r} has {len(texts)} choices, more than there are letters",
                where=row.where,
                hint='give them labels of their own, {"text": [...], "label": [...]}, or leave some out',
            )
        if not _are_texts(labels) or not len(texts) == len(labels) == len(set(labels)):
            raise self._bad_choices(row)
        return _Choices(texts, labels, isinstance(found, dict))

    def _bad_choices(self, row: Row) -> DataError:
        column = self.section.choices
        has = f"found {describe(row.values[column])}" if column in row.values else "found no such column"
        return DataError(
            f"column {column!r} must contain choices, {has}",
            where=row.where,
            hint='write a list of texts, or {"text": [...], "label": [...]}, or name its column: '
            "{format: multiple_choice, choices: <column>}",
        )

    def _right(self, row: Row, choices: _Choices) -> int:
        """Index of the correct choice."""
        answer = row.values.get(self.section.answer)
        index = _index(answer, choices)
        if index is not None and 0 <= index < len(choices.texts):
            return index
        # A label of one choice can be the text of another: the labels 1 to 4 of numbers, for instance. Labels that the
        # row gives itself take precedence; otherwise such an answer is ambiguous.
        pairs = zip(choices.texts, choices.labels, strict=True)
        matches = {index for index, names in enumerate(pairs) if answer in names}
        if choices.has_own_labels and answer in choices.labels:
            matches = {choices.labels.index(answer)}
        if len(matches) != 1:
            kind = "more than one" if matches else "none"
            raise DataError(
                f"column {self.section.answer!r} must name one of {len(choices.texts)} choices, "
                f"found {describe(answer)}, which matches {kind} of {excerpt(', '.join(choices.texts))}",
                where=row.where,
                hint="write its number from 0, its letter or its text, or name the column: "
                "{format: multiple_choice, answer: <column>}",
            )
        return matches.pop()


def _index(answer: Any, choices: _Choices) -> int | None:
    """The index that an answer is: a number, or digits in text, as in CSV files, that are no label or text."""
    if type(answer) is int:
        return answer
    if not isinstance(answer, str) or not answer.isdecimal() or answer in choices.texts:
        return None
    return None if any(label.isdecimal() for label in choices.labels) else int(answer)


def _are_texts(values: Any) -> TypeGuard[list[str]]:
    return isinstance(values, list) and bool(values) and all(isinstance(value, str) for value in values)

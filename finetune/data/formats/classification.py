"""Classification: a text and its label, which the model learns to generate."""

from __future__ import annotations

from dataclasses import replace

from finetune.data.documents import Conversation, Message
from finetune.data.formats.conversation import ConversationFormat, answer_text
from finetune.data.rows import LabelName, Row, describe, excerpt
from finetune.errors import DataError
from finetune.recipe.sections.data import ClassificationSource


class ClassificationFormat(ConversationFormat[ClassificationSource]):
    """Rows of text and label."""

    def document(self, row: Row) -> Conversation:
        """The text as the user's turn and the name of the label as the assistant's."""
        section = self.section
        messages = [Message("user", row.text(section.text)), Message("assistant", self._label(row))]
        system = section.system and section.system.replace("{labels}", ", ".join(section.labels))
        conversation = self.conversation(row, messages, system=system, choices=tuple(section.labels))
        return replace(conversation, has_label=True)

    def _label(self, row: Row) -> str:
        column, labels = self.section.label, self.section.labels
        found = row.values.get(column)
        if isinstance(found, LabelName) and labels and found not in labels:
            found = found.number
        elif isinstance(found, str):
            found = self._index(answer_text(found, column, row))
        if type(found) is int and 0 <= found < len(labels):
            return labels[found]
        if type(found) is int and not labels:
            raise DataError(
                f"column {column!r} contains the number {found}, and the labels have no names",
                where=row.where,
                hint="name them in the source's section: {format: classification, labels: [...]}; the names may be "
                'numbers: ["0", "1"]',
            )
        if labels and found not in labels:
            names = excerpt(", ".join(labels))
            raise DataError(
                f"column {column!r} must be one of {names}, found {describe(row.values.get(column))}",
                where=row.where,
                hint="add the label to labels in the source's section, or correct the row",
            )
        return row.text(column)

    def _index(self, label: str) -> str | int:
        """The number in a label of digits, as CSV files have them; where names have digits only, it is a name."""
        has_numbers = any(name.isdecimal() for name in self.section.labels)
        return int(label) if label.strip().isdecimal() and not has_numbers else label

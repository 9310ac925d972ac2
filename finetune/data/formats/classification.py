"""Classification: a text and its label, which the model learns to generate."""

from __future__ import annotations

from finetune.data.documents import Conversation, Format, Message
from finetune.data.rows import Row, describe, excerpt
from finetune.errors import DataError
from finetune.recipe.sections.data import ClassificationSource


class ClassificationFormat(Format[ClassificationSource]):
    """Rows of text and label."""

    def document(self, row: Row) -> Conversation:
        """The text as the user's turn and the name of the label as the assistant's."""
        messages = [Message("user", row.text(self.section.text)), Message("assistant", self._label(row))]
        if self.section.system is not None:
            system = self.section.system.replace("{labels}", ", ".join(self.section.labels))
            messages.insert(0, Message("system", system))
        return Conversation(tuple(messages), choices=tuple(self.section.labels))

    def _label(self, row: Row) -> str:
        column, labels = self.section.label, self.section.labels
        found = row.values.get(column)
        if type(found) is int and 0 <= found < len(labels):
            return labels[found]
        if type(found) is int and not labels:
            raise DataError(
                f"column {column!r} contains the number {found}, and the labels have no names",
                where=row.where,
                hint="name them in the source's section: {format: classification, labels: [...]}",
            )
        if labels and found not in labels:
            raise DataError(
                f"column {column!r} must be one of {excerpt(', '.join(labels))}, found {describe(found)}",
                where=row.where,
                hint="correct the row, or add its label to labels in the source's section",
            )
        return row.text(column)

"""Text: plain text for continued pre-training."""

from __future__ import annotations

from finetune.data.documents import Format, PlainText
from finetune.data.rows import Row
from finetune.errors import BadRow
from finetune.recipe.sections.data import TextSource


class TextFormat(Format[TextSource]):
    """Rows of text; every token is a target."""

    def document(self, row: Row) -> PlainText:
        """The text as a completion without a prompt."""
        column = self.section.text
        text = row.text(column)
        if not text.strip():
            raise BadRow(
                f"the text in column {column!r} is empty", reason="without text", where=row.where, hint="remove the row"
            )
        return PlainText("", text)

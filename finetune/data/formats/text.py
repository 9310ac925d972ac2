"""Text: plain text for continued pre-training."""

from __future__ import annotations

from finetune.data.documents import Format, PlainText
from finetune.data.rows import Row
from finetune.recipe.sections.data import TextSource


class TextFormat(Format[TextSource]):
    """Rows of text; every token is a target."""

    def document(self, row: Row) -> PlainText:
        """The text as a completion without a prompt."""
        return PlainText("", row.text(self.section.text))

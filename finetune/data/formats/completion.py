"""Completion: a prompt and its continuation."""

from __future__ import annotations

from finetune.data.documents import Conversation, Document, Format, Message, PlainText
from finetune.data.rows import Row
from finetune.recipe.sections.data import CompletionSource


class CompletionFormat(Format[CompletionSource]):
    """Rows of prompt and completion."""

    def document(self, row: Row) -> Document:
        """The two texts concatenated, or as a user's and an assistant's turn."""
        prompt, completion = row.text(self.section.prompt), row.text(self.section.completion)
        if self.section.chat_template:
            return Conversation((Message("user", prompt), Message("assistant", completion)))
        return PlainText(prompt, completion)

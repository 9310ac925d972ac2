"""Completion: a prompt and its continuation."""

from __future__ import annotations

from finetune.data.documents import Document, Message, PlainText
from finetune.data.formats.conversation import ConversationFormat, answer_text
from finetune.data.rows import Row
from finetune.recipe.sections.data import CompletionSource


class CompletionFormat(ConversationFormat[CompletionSource]):
    """Rows of prompt and completion."""

    def read_columns(self, row: Row) -> set[str]:
        """See the base class."""
        columns = super().read_columns(row)
        texts = {self.section.prompt, self.section.completion, *self._marks(row)}
        return columns if self.section.chat_template else texts

    def document(self, row: Row) -> Document:
        """The two texts concatenated, or as a user's and an assistant's turn."""
        prompt, column = row.text(self.section.prompt), self.section.completion
        completion = answer_text(row.text(column), column, row)
        if self.section.chat_template:
            return self.conversation(row, [Message("user", prompt), Message("assistant", completion)])
        self.refuse_marked(row)
        return PlainText(prompt, completion)

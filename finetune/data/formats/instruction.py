"""Instruction: an instruction, an optional input and the output, as one exchange."""

from __future__ import annotations

from finetune.data.documents import Conversation, Format, Message
from finetune.data.sources import Row
from finetune.recipe.data import InstructionSource


class InstructionFormat(Format[InstructionSource]):
    """Rows in the form of the Alpaca data set."""

    def document(self, row: Row) -> Conversation:
        """The instruction, with the input below it, as the user's turn and the output as the assistant's."""
        section = self.section
        instruction, given = row.text(section.instruction), row.optional_text(section.input)
        user = f"{instruction}\n\n{given}" if given else instruction
        messages = [Message("user", user), Message("assistant", row.text(section.output))]
        if section.system is not None:
            messages.insert(0, Message("system", section.system))
        return Conversation(tuple(messages))

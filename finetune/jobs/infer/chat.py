"""`ft chat`: a conversation with a run or a model."""

from __future__ import annotations

from finetune.data.documents import Conversation, Message
from finetune.errors import UsageError
from finetune.evaluation.generation import Sampling, Tell
from finetune.jobs.infer.generate import Question, answer
from finetune.jobs.load.finetuned_model import FineTunedModel, SharedBase
from finetune.jobs.load.model_ref import ModelRef
from finetune.run.events import EventHandler


class Chat:
    """The turns so far, and who answers.

    Args:
        base: Who answers, alone.
        system: Message to put first.
        sampling: How tokens are chosen.

    Attributes:
        system: May be set between two turns.
        turns: User and assistant by turns.
    """

    def __init__(self, base: SharedBase, system: str | None, sampling: Sampling) -> None:
        self.base, self.system, self.sampling = base, system, sampling
        self.turns: list[Message] = []

    @classmethod
    def open(cls, named: ModelRef, system: str | None, sampling: Sampling, on_event: EventHandler) -> Chat:
        """Find and load who answers.

        Raises:
            UsageError: It knows no turns.
            FinetuneError: It cannot be opened.
        """
        finetuned = FineTunedModel.find(named, on_event)
        if not finetuned.uses_chat_template:
            raise UsageError(
                "it goes on with plain text and knows no turns",
                where=named.given,
                hint=f'let it go on with a text: ft generate {named.given} --prompt "..."',
            )
        chat = cls(SharedBase([finetuned], on_event), system, sampling)
        chat.base.model(0)
        return chat

    def say(self, text: str, tell: Tell) -> None:
        """Take a user's turn and answer it.

        An answer that is interrupted stays as far as it was told; a turn that got no word of an answer is forgotten.

        Args:
            text: What the user says.
            tell: Told the answer piece by piece.

        Raises:
            DataError: The template refuses the turns, or they leave no room for an answer.
        """
        opening = [Message("system", self.system)] if self.system else []
        asked = Message("user", text)
        told: list[str] = []

        def note(piece: str) -> None:
            told.append(piece)
            tell(piece)

        question = Question(Conversation((*opening, *self.turns, asked)), 0, "the conversation")
        try:
            answer(self.base, [question], self.sampling, tell=note)
        finally:
            if told:
                self.turns += [asked, Message("assistant", "".join(told))]

    def clear(self) -> None:
        """Forget all turns."""
        self.turns.clear()

"""`ft chat`: a conversation with a run or a model."""

from __future__ import annotations

from finetune.data.documents import Conversation, Message
from finetune.errors import UsageError
from finetune.evaluation.generation import OnText, Sampling
from finetune.jobs.infer.generate import Question, answer
from finetune.jobs.load.finetuned_model import FineTunedModel, SharedBase
from finetune.jobs.load.model_ref import ModelRef
from finetune.recipe.sections.model import Dtype
from finetune.run.events import EventHandler


class Chat:
    """A conversation so far, and the model that answers.

    Args:
        base: The model.
        system: System message at the beginning.
        sampling: Selection of tokens.

    Attributes:
        system: May be set between two turns.
        turns: Messages of user and assistant in turn.
    """

    def __init__(self, base: SharedBase, system: str | None, sampling: Sampling) -> None:
        self.base, self.system, self.sampling = base, system, sampling
        self.turns: list[Message] = []

    @classmethod
    def open(
        cls,
        named: ModelRef,
        system: str | None,
        sampling: Sampling,
        on_event: EventHandler,
        dtype: Dtype | None = None,
    ) -> Chat:
        """Find and load the model.

        Raises:
            UsageError: It was trained on plain text, without turns.
            FinetuneError: It cannot be opened.
        """
        finetuned = FineTunedModel.find(named, on_event, dtype)
        finetuned.note_generation_dtype()
        if not finetuned.uses_chat_template:
            raise UsageError(
                "it was trained on plain text, without turns",
                where=named.given,
                hint=f'continue a text instead: ft generate {named.given} --prompt "..."',
            )
        chat = cls(SharedBase([finetuned], on_event), system, sampling)
        chat.base.model(0)
        return chat

    def say(self, text: str, on_text: OnText) -> None:
        """Add a user's turn and generate the answer.

        An interrupted answer is kept as far as it was streamed. A turn whose answer has no text is dropped.

        Args:
            text: The message of the user.
            on_text: Receives the answer piece by piece.

        Raises:
            DataError: The template rejects the turns, or they leave no room for an answer.
        """
        opening = [Message("system", self.system)] if self.system else []
        turn = Message("user", text)
        streamed: list[str] = []

        def note(piece: str) -> None:
            streamed.append(piece)
            on_text(piece)

        question = Question(Conversation((*opening, *self.turns, turn)), 0, "the conversation")
        try:
            answer(self.base, [question], self.sampling, on_text=note)
        finally:
            if streamed:  # in `finally`: Ctrl-C ends an answer, not the conversation
                self.turns += [turn, Message("assistant", "".join(streamed))]

    def clear(self) -> None:
        """Drop all turns."""
        self.turns.clear()

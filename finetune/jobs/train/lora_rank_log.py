"""The log of LoRA ranks that a method assigns to layers during training (AdaLoRA)."""

from __future__ import annotations

from finetune.report.lora_ranks import picture
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler, RanksChosen
from finetune.run.history import History
from finetune.storage.files import write_text
from finetune.train.state import TrainState


class LoraRankLogger:
    """Records changed ranks and plots them at the end; idle where the method assigns none.

    Args:
        state: Of the run, before its next step.
        record: Called with each assignment.
    """

    def __init__(self, state: TrainState, record: EventHandler) -> None:
        self.state, self.record = state, record
        self.ranks = state.method.ranks(state.bare_model)
        if state.step == 0:
            self._write()

    def follow(self) -> None:
        """Record the ranks if the last step changed them."""
        ranks = self.state.method.ranks(self.state.bare_model)
        if ranks != self.ranks:
            self.ranks = ranks
            self._write()

    def plot(self, run: RunDirectory, total_steps: int) -> None:
        """Write the plot of all assignments into the run directory."""
        if self.ranks is None:
            return
        write_text(run.ranks_picture, picture(History.of(run).ranks, total_steps))

    def _write(self) -> None:
        if self.ranks is not None:
            self.record(RanksChosen(step=self.state.step, ranks=self.ranks))

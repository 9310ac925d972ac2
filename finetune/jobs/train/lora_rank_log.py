"""Writing down the ranks that a method gives to layers while it trains."""

from __future__ import annotations

from finetune.report.lora_ranks import picture
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler, RanksChosen
from finetune.run.history import History
from finetune.storage.files import write_text
from finetune.train.state import TrainState


class LoraRankLogger:
    """Follows the ranks of a run into `metrics.jsonl`, and draws them in the end; idle where a method chooses none.

    Args:
        state: Of the run, before its next step.
        record: Told of every choice.
    """

    def __init__(self, state: TrainState, record: EventHandler) -> None:
        self.state, self.record = state, record
        self.ranks = state.method.ranks(state.bare_model)
        if state.step == 0:
            self._write()

    def follow(self) -> None:
        """Write down what the last step has changed."""
        ranks = self.state.method.ranks(self.state.bare_model)
        if ranks != self.ranks:
            self.ranks = ranks
            self._write()

    def draw(self, run: RunDirectory, total_steps: int) -> None:
        """Leave a picture of all choices in the run directory."""
        if self.ranks is None:
            return
        write_text(run.ranks_picture, picture(History.of(run).ranks, total_steps))

    def _write(self) -> None:
        if self.ranks is not None:
            self.record(RanksChosen(step=self.state.step, ranks=self.ranks))

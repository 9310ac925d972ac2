"""Early stopping: the weights with the lowest validation loss are kept and become the result."""

from __future__ import annotations

import logging

from finetune.jobs.train.checkpointing import CheckpointManager
from finetune.run.checkpoints import Checkpoints
from finetune.run.directory import RunDirectory
from finetune.run.events import BestCheckpoint, ValidationResult
from finetune.run.history import History
from finetune.train.checkpoint import read_state
from finetune.train.state import TrainState

logger = logging.getLogger(__name__)


class EarlyStopping:
    """Compares the validation losses of a run; idle where the recipe sets no patience.

    Args:
        limit: Measurements in a row without a lower loss after which training stops; None for no limit.
        history: Of the run so far, earlier attempts included.
    """

    def __init__(self, limit: int | None, history: History) -> None:
        self._limit = limit
        self._best: ValidationResult | None = None
        self._without = 0
        for validated in history.validations:
            self._take(validated)

    @property
    def best_step(self) -> int | None:
        """The step with the lowest loss so far; None without patience."""
        return self._best.step if self._limit is not None and self._best is not None else None

    @property
    def is_over(self) -> bool:
        """Whether so many measurements in a row brought no lower loss that training stops."""
        return self._limit is not None and self._without >= self._limit

    def update(
        self, validated: ValidationResult | None, state: TrainState, checkpoints: CheckpointManager | None
    ) -> None:
        """Compare a measurement, and save a checkpoint of the state if it is the best so far.

        Args:
            validated: The measurement; None where there was none.
            state: The state that was measured.
            checkpoints: Of a rank that takes part in saving; None in the others.
        """
        if self._limit is not None and validated is not None and self._take(validated) and checkpoints is not None:
            checkpoints.save_best(state)

    def restore(self, state: TrainState, run: RunDirectory, total_steps: int) -> BestCheckpoint | None:
        """Load the best weights into the state; None where the last weights are the best."""
        best, step = self._best, state.step
        if self._limit is None or best is None or best.step == step:
            return None
        if best.step == 0:
            logger.warning("training never lowered the validation loss; the last weights are kept")
            return None
        checkpoint = Checkpoints(run.checkpoints).at_step(best.step)
        if checkpoint is None:
            logger.warning(
                "the checkpoint with the lowest validation loss, of step %d, is lost; the last weights are kept",
                best.step,
            )
            return None
        read_state(state, checkpoint.path)
        return BestCheckpoint(step, best.step, best.loss, stopped_early=step < total_steps)

    def _take(self, validated: ValidationResult) -> bool:
        """Whether a measurement is the lowest so far."""
        if self._best is None or validated.loss < self._best.loss:
            self._best, self._without = validated, 0
            return True
        self._without += 1
        return False

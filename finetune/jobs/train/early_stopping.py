"""Early stopping: the weights whose held-out loss is the lowest are kept, and become the result."""

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
    """Follows the held-out loss of a run; idle where the recipe has no patience.

    Args:
        limit: Measurements in a row without a lower loss after which training stops; None for no limit.
        history: The course so far, of which an earlier attempt may have measured a part.
    """

    def __init__(self, limit: int | None, history: History) -> None:
        self._limit = limit
        self._best: ValidationResult | None = None
        self._without = 0
        for validated in history.validations:
            self._take(validated)

    @property
    def best_step(self) -> int | None:
        """The step whose weights may become the result; None where only the last ones can."""
        return self._best.step if self._limit is not None and self._best is not None else None

    @property
    def is_over(self) -> bool:
        """Whether the run has waited long enough."""
        return self._limit is not None and self._without >= self._limit

    def see(
        self, validated: ValidationResult | None, state: TrainState, checkpoints_: CheckpointManager | None
    ) -> None:
        """Take a measurement, and keep a checkpoint of the state if it is the best so far.

        Args:
            validated: The measurement; None where there was none.
            state: That was measured.
            checkpoints_: Of the main process; the others have none.
        """
        if self._limit is not None and validated is not None and self._take(validated) and checkpoints_ is not None:
            checkpoints_.save_best(state)

    def restore(self, state: TrainState, run: RunDirectory, total_steps: int) -> BestCheckpoint | None:
        """Put the best weights into the state, unless it has them; None where they are those of the last step."""
        best, step = self._best, state.step
        if self._limit is None or best is None or best.step == step:
            return None
        if best.step == 0:
            logger.warning("training has never lowered the held-out loss; the last weights are kept")
            return None
        checkpoint = Checkpoints(run.checkpoints).at_step(best.step)
        if checkpoint is None:
            logger.warning(
                "the weights of step %d, whose held-out loss was lowest, are lost; the last are kept", best.step
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

"""Checkpoints of a run: when they are due, and how they are committed."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import EnvironmentFault
from finetune.recipe.sections.training import Training
from finetune.run.checkpoints import Checkpoints
from finetune.run.directory import Attempt, RunDirectory
from finetune.run.events import CheckpointSaved, EventHandler
from finetune.storage.opening import read_bytes, write_new
from finetune.train.checkpoint import write_state
from finetune.train.state import TrainState

logger = logging.getLogger(__name__)

SECONDS_BETWEEN = 300.0
"""Between two checkpoints where the recipe sets no interval: a crash costs this much work at most."""

LARGEST_SHARE = 0.05
"""Fraction of the time that saving may take: checkpoints that are slow to write are written less often."""


class CheckpointManager:
    """Commits checkpoints of a run when they are due.

    Without shards only the main process needs one, because the trainable parameters are the same in all. With shards
    every rank has one, follows the main rank's decision, and takes part in the all-gathers.

    Args:
        run: The run directory.
        attempt: Its field `checkpoint` is set to each committed step.
        training: The recipe's section: how often, and how many are kept.
        facts: Identity of the run, which must be the same when it resumes.
        on_event: Called with each checkpoint.
        best: The step with the lowest validation loss: its checkpoint is never removed.
    """

    def __init__(
        self,
        run: RunDirectory,
        attempt: Attempt,
        training: Training,
        facts: Mapping[str, Any],
        on_event: EventHandler,
        best: int | None = None,
    ) -> None:
        self._run = run
        self._attempt = attempt
        self._training = training
        self._facts = facts
        self._on_event = on_event
        self._checkpoints = Checkpoints(run.checkpoints)
        self._due = time.monotonic() + SECONDS_BETWEEN
        self._best = best

    def save_if_due(self, state: TrainState) -> None:
        """Commit a checkpoint if one is due; a full disk is a warning.

        Raises:
            DivergedError: A number in it is not finite.
        """
        every = self._training.checkpoint_every_steps
        is_due = state.step % every == 0 if every else time.monotonic() >= self._due
        if state.agreed_by_main(is_due or state.step == self._facts["total_steps"]):
            self._save_if_there_is_room(state)

    def save_best(self, state: TrainState) -> None:
        """Commit a checkpoint of the state with the lowest validation loss, and release the previous best one.

        Raises:
            DivergedError: A number in it is not finite.
        """
        self._best = state.step
        self._save_if_there_is_room(state)

    def _save_if_there_is_room(self, state: TrainState) -> None:
        try:
            self.save(state)
        except EnvironmentFault as fault:
            self._due = time.monotonic() + SECONDS_BETWEEN
            saved = self._attempt.checkpoint
            rest = "nothing is saved yet" if saved is None else f"the checkpoint of step {saved} remains"
            logger.warning("step %d could not be saved: %s (%s; training continues)", state.step, fault.what, rest)

    def save(self, state: TrainState) -> None:
        """Commit a checkpoint of the last finished step, unless it is committed already.

        Raises:
            DivergedError: A number in it is not finite.
            EnvironmentFault: It cannot be written.
        """
        if not state.agreed_by_main(state.step not in (0, self._attempt.checkpoint)):
            return
        if not state.accelerator.is_main_process:
            write_state(state, None)
            return
        began = time.monotonic()

        def write(folder: Path) -> None:
            write_state(state, folder)
            write_new(folder / self._run.recipe.name, read_bytes(self._run.recipe))

        facts = {**self._facts, "metrics_bytes": self._run.sync_metrics()}
        committed = self._checkpoints.commit(state.step, facts, write)
        self._attempt.checkpoint = state.step
        self._checkpoints.retain(self._training.checkpoints_kept, self._best)
        seconds = time.monotonic() - began
        self._due = time.monotonic() + max(SECONDS_BETWEEN, seconds / LARGEST_SHARE)
        self._on_event(CheckpointSaved(committed.path.name, state.step, committed.size_bytes, seconds))

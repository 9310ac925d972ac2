"""Opening a run for `ft merge` and `ft export`: what is not supported is refused before weights are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finetune.jobs.load.context import TrainingContext
from finetune.jobs.load.trained_run import FineTunedRun
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler
from finetune.storage.files import CHECK_DISK, check_output, check_writable


def open_for_output(
    run: RunDirectory,
    target: Path,
    overwrite: bool,
    check_support: Callable[[TrainingContext], object],
    on_event: EventHandler,
) -> FineTunedRun:
    """Open a run whose model is to be written.

    Args:
        run: A finished run.
        target: The folder to write.
        overwrite: Replace an existing folder.
        check_support: Raises if the run cannot be written in the wanted form; sees recipe, method and config.
        on_event: Receives a `Phase`.

    Raises:
        UnsupportedError: As `check_support`. It comes first: another folder would not help.
        RefusedError: The folder exists, or the base is not that of the training.
        EnvironmentFault: The disk is full or read-only.
    """
    check_writable(target, f"{CHECK_DISK}, or choose another --output")

    def check(context: TrainingContext) -> None:
        check_support(context)
        check_output(target, overwrite, is_folder=True)

    return FineTunedRun.open(run, on_event, check=check)

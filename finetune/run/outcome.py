"""`exit.json`: how the last attempt at training a run ended."""

from __future__ import annotations

from pathlib import Path

from typing_extensions import TypedDict

from finetune.storage.records import Count, Flag, Integer, read_record, with_other_keys


@with_other_keys
class Outcome(TypedDict, total=False):
    """The content of `exit.json`.

    Attributes:
        code: Exit code; 0 if the run completed all its steps.
        step: Optimizer steps done.
        resumable: Whether the run can resume from a checkpoint.
        checkpoint: Step of the newest checkpoint; None without one.
        message: Reason.
        ended: Time.
    """

    code: Integer
    step: Count
    resumable: Flag
    checkpoint: Count | None
    message: str
    ended: str


def read_outcome(file: Path) -> Outcome:
    """The outcome, as far as it is recorded and undamaged."""
    return read_record(file, Outcome)

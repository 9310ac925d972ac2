"""Follow a run that another process trains, through its files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import cast

from pydantic import ValidationError

from finetune.run.directory import RunDirectory
from finetune.run.events import Event, Phase, TrainingStarted
from finetune.run.history import events, parsed
from finetune.run.provenance import read_provenance
from finetune.storage.opening import open_to_read
from finetune.storage.records import adapter

POLL_SECONDS = 1.0
"""Seconds between two reads of the files."""


def watched(run: RunDirectory, sleep: Callable[[float], None] = time.sleep) -> Iterator[Event]:
    """Yield the recorded events of a run, then new ones as they appear, until no process trains it.

    If the run resumes from a checkpoint meanwhile, the steps after that checkpoint are yielded again.

    Args:
        run: Any run, also a finished one or one whose process was killed.
        sleep: Waits for this many seconds.
    """
    started = False
    position = 0
    while True:
        is_trained = run.is_locked  # checked before reading, so that the last lines of an ending process are not missed
        if not started and (start := _start(run)) is not None:
            started = True
            yield start
        lines, position = _lines_from(run, position)
        yield from events(parsed(lines))
        if not is_trained:
            return
        if position == 0:
            yield Phase("waiting for the first step")
        sleep(POLL_SECONDS)


def _start(run: RunDirectory) -> TrainingStarted | None:
    """The `started` event of a run; None before training starts, or if another version of ft wrote it."""
    recorded = read_provenance(run.provenance).get("started")
    try:
        values = {**recorded, "run_directory": str(run.path)} if recorded else {}
        return cast(TrainingStarted, adapter(TrainingStarted).validate_python(values))
    except ValidationError:
        return None


def _lines_from(run: RunDirectory, position: int) -> tuple[list[str], int]:
    """Complete lines after a byte offset, and the offset after them; from offset 0 if the file was truncated."""
    try:
        with open_to_read(run.metrics) as file:
            if file.seek(0, 2) < position:
                position = 0  # a resume cut the file back to its checkpoint
            file.seek(position)
            text, newline, _ = file.read().rpartition(b"\n")
    except OSError:
        return [], 0
    lines = text.decode("utf-8", errors="replace").split("\n") if newline else []
    return lines, position + len(text) + len(newline)

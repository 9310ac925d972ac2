"""Following a run that another process trains, by what it writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from finetune.run.directory import RunDirectory
from finetune.run.events import Event, Phase, TrainingStarted
from finetune.run.history import events, parsed
from finetune.storage.files import read_json

POLL_SECONDS = 1.0
"""Between two looks at the files."""


def watched(run: RunDirectory, sleep: Callable[[float], None] = time.sleep) -> Iterator[Event]:
    """All that a run has recorded, and goes on to record; ends when nobody trains it.

    Where the run goes on from a checkpoint meanwhile, what it trains anew comes again.

    Args:
        run: Any, also one that is finished or whose process was killed.
        sleep: Waits so many seconds.
    """
    started = False
    position = 0
    while True:
        is_trained = run.is_locked  # asked first: what was written until its process ended is read below
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
    """What a run started with; None before that, and where another version wrote it."""
    try:
        return TrainingStarted(run_directory=str(run.path), **read_json(run.provenance)["started"])
    except (KeyError, TypeError):
        return None


def _lines_from(run: RunDirectory, position: int) -> tuple[list[str], int]:
    """The whole lines past a position in bytes, and the position after them; from the start if the file was cut."""
    try:
        with run.metrics.open("rb") as file:
            if file.seek(0, 2) < position:
                position = 0
            file.seek(position)
            text, newline, _ = file.read().rpartition(b"\n")
    except OSError:
        return [], 0
    lines = text.decode("utf-8", errors="replace").split("\n") if newline else []
    return lines, position + len(text) + len(newline)

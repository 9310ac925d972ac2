"""Trackers run in subprocesses, so that one that raises, hangs or crashes cannot affect the run.

Each event is a line of JSON in a non-blocking pipe. A tracker replies with the place where its run can be seen, or
with the reason of its failure, which is logged once. `metrics.jsonl` is the record; trackers hold copies.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.util import find_spec
from typing import Any

from finetune.errors import UnsupportedError
from finetune.recipe.recipe import Recipe
from finetune.recipe.secrets import redacted
from finetune.recipe.sections.tracking import TrackerSection
from finetune.run.directory import RunDirectory
from finetune.run.events import Event, EventHandler, Phase, StepMetrics, ValidationResult
from finetune.storage.opening import read_bytes

logger = logging.getLogger(__name__)

FINISH_SECONDS = 30.0
"""Time limit for sending pending data at the end of a run."""

FINISH_SECONDS_IF_STOPPED = 5.0
"""The same for a stopped run: the machine may be about to shut down."""

LATE = 3
"""Exit code of a tracker's process that exceeded the time limit."""

ENDED = {"event": "ended"}
"""The last line after a run that completed."""

PIPE_BYTES = 1 << 20
"""Capacity of the pipe. It buffers some thousand steps while a tracker's process imports its package."""

ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}
"""Disables telemetry of the packages."""


@dataclass(frozen=True)
class TrackerSetup:
    """The first line for a tracker's process.

    Attributes:
        section: The recipe's section of the tracker.
        folder: Folder for its files, in the run directory.
        name: Name of the run.
        id: Stable over resumes of the run, different for every other run.
        recipe: The resolved recipe.
    """

    section: dict[str, Any]
    folder: str
    name: str
    id: str
    recipe: dict[str, Any]


def refuse_missing_packages(trackers: Sequence[TrackerSection]) -> None:
    """Check that every tracker's package is installed, before the run.

    Raises:
        UnsupportedError: A package is missing.
    """
    for index, tracker in enumerate(trackers):
        if find_spec(tracker.name) is None:
            raise UnsupportedError(
                f"the package {tracker.name} is not installed",
                where=f"trackers.{index}.name",
                hint=f"pip install {tracker.name}, or remove the tracker",
            )


@contextmanager
def tracked(recipe: Recipe, run: RunDirectory, on_event: EventHandler) -> Iterator[EventHandler]:
    """An event handler that also sends metrics to the recipe's trackers; their processes end with the block.

    Args:
        recipe: Names the trackers.
        run: Holds their files.
        on_event: Handler that is called first.
    """
    processes = [TrackerProcess(tracker.name, _setup(tracker, recipe, run)) for tracker in recipe.trackers]

    def handle_and_track(event: Event) -> None:
        on_event(event)
        if isinstance(event, StepMetrics | ValidationResult):
            for process in processes:
                process.send({"step": event.step, "values": _values(event)})

    seconds = FINISH_SECONDS_IF_STOPPED
    try:
        yield handle_and_track
        for process in processes:
            process.send(ENDED)
        seconds = FINISH_SECONDS
    finally:
        if processes:
            on_event(Phase(f"finishing {', '.join(process.name for process in processes)}"))
            _finish(processes, seconds)


def _finish(processes: Sequence[TrackerProcess], seconds: float) -> None:
    """Give all trackers the same time to send pending data, then kill the rest."""
    for process in processes:
        process.close()
    deadline = time.monotonic() + seconds
    try:
        for process in processes:
            process.wait(deadline)
    finally:
        for process in processes:
            process.kill()


def _setup(tracker: TrackerSection, recipe: Recipe, run: RunDirectory) -> TrackerSetup:
    # The marker holds the time of creation: a run that replaces another at the same path gets another id.
    made = read_bytes(run.marker) if run.marker.is_file() else b""
    return TrackerSetup(
        section=tracker.model_dump(mode="json"),
        folder=str(run.trackers / tracker.name),
        name=str(recipe.run.name),
        id=sha256(str(run.path).encode() + made).hexdigest()[:12],
        recipe=recipe.model_dump(mode="json"),
    )


def _values(event: StepMetrics | ValidationResult) -> dict[str, float]:
    """An event's finite numbers, named `train/loss`, `validation/loss` and so on, which trackers group by prefix."""
    group = "train" if isinstance(event, StepMetrics) else "validation"
    dropped = ("event", "step", "total_steps", "seconds", "rows")
    numbers = {name: value for name, value in event.to_json().items() if name not in dropped and value is not None}
    return {f"{group}/{name}": value for name, value in numbers.items()}


class TrackerProcess:
    """A tracker's subprocess.

    Args:
        name: Name of the tracker, for messages.
        setup: The first line for the subprocess.
    """

    def __init__(self, name: str, setup: TrackerSetup) -> None:
        self.name = name
        self._process: subprocess.Popen[bytes] | None = None
        self._replies = b""
        try:
            os.makedirs(setup.folder, exist_ok=True)
            self._process = _start(setup)
        except OSError as error:
            self._warn(f"it could not be started: {error.strerror}")

    def send(self, record: Mapping[str, Any]) -> None:
        """Send a record without blocking; a tracker whose pipe is full is given up."""
        self._listen()
        if self._process is None:
            return
        assert self._process.stdin is not None
        try:
            # Shorter than PIPE_BUF, so the write is atomic: complete or BlockingIOError.
            os.write(self._process.stdin.fileno(), json.dumps(record).encode() + b"\n")
        except BlockingIOError:
            self._give_up("it does not keep up")
        except OSError:
            self._listen()
            self._give_up("its process has ended")

    def close(self) -> None:
        """Signal the end of input."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def wait(self, deadline: float) -> None:
        """Wait for its exit until `deadline`, in seconds of the monotonic clock."""
        if self._process is None:
            return
        try:
            code = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = LATE
        self._listen()
        if code == LATE:
            self._give_up("it did not finish in time")
        elif code:
            self._give_up(f"its process has ended with {code}")

    def kill(self) -> None:
        """Kill the subprocess and its children, if they still run."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def _listen(self) -> None:
        """Log the replies since the last call."""
        if self._process is None:
            return
        assert self._process.stdout is not None
        with suppress(BlockingIOError):
            while received := os.read(self._process.stdout.fileno(), 1 << 16):
                self._replies += received
        *lines, self._replies = self._replies.split(b"\n")
        for reply in map(json.loads, lines):
            if "where" in reply:
                logger.info("%s tracks the run: %s", self.name, redacted(reply["where"]))
            else:
                self._give_up(reply["failed"])
                return

    def _give_up(self, why: str) -> None:
        """Kill the subprocess and warn, once."""
        if self._process is not None:
            self.kill()
            self._warn(why)

    def _warn(self, why: str) -> None:
        first_line = redacted(why).strip().partition("\n")[0][:200]
        logger.warning("%s no longer tracks the run, which continues without it: %s", self.name, first_line)


def _start(setup: TrackerSetup) -> subprocess.Popen[bytes]:
    """Start a subprocess with non-blocking pipes and send its setup."""
    path = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "finetune.run.trackers.clients"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        cwd=setup.folder,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path, "WANDB_CACHE_DIR": setup.folder},
        start_new_session=True,  # Ctrl-C must reach the run only, which then ends its trackers
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(OSError, AttributeError):  # only Linux can resize a pipe
        fcntl.fcntl(process.stdin, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    process.stdin.write(json.dumps(asdict(setup)).encode() + b"\n")
    os.set_blocking(process.stdin.fileno(), False)
    os.set_blocking(process.stdout.fileno(), False)
    return process

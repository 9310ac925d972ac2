"""Trackers follow a run from processes of their own: one that raises, hangs or crashes cannot touch the run.

A line of JSON in a pipe tells a tracker's process of each event, and is never waited for. What a tracker has to say,
where it can be seen or why it failed, is told once. `metrics.jsonl` is the record; trackers are copies.
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

logger = logging.getLogger(__name__)

FINISH_SECONDS = 30.0
"""Time that trackers have at the end of a run to send what is left."""

FINISH_SECONDS_IF_STOPPED = 5.0
"""The same where the run was stopped, for then the machine may be about to go."""

LATE = 3
"""Exit code of a tracker's process that was not done in time."""

ENDED = {"event": "ended"}
"""The last line of a run that came to its end."""

PIPE_BYTES = 1 << 20
"""Lines that wait in the pipe while a tracker's process starts: some thousand steps."""

ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}
"""Keeps packages from reporting on their user."""


@dataclass(frozen=True)
class Opening:
    """What a tracker's process is told first.

    Attributes:
        section: The recipe's section of the tracker.
        folder: A folder of the run directory for its files.
        name: Of the run.
        id: The same whenever the run is gone on with, and only then.
        recipe: With every default.
    """

    section: dict[str, Any]
    folder: str
    name: str
    id: str
    recipe: dict[str, Any]


def refuse_missing_packages(trackers: Sequence[TrackerSection]) -> None:
    """Every tracker's package must be installed before the run.

    Raises:
        UnsupportedError: One is not.
    """
    for index, tracker in enumerate(trackers):
        if find_spec(tracker.name) is None:
            raise UnsupportedError(
                f"the package {tracker.name} is not installed",
                where=f"trackers.{index}.name",
                hint=f"pip install {tracker.name}, or leave the tracker out",
            )


@contextmanager
def tracked(recipe: Recipe, run: RunDirectory, on_event: EventHandler) -> Iterator[EventHandler]:
    """A report that tells the recipe's trackers too; they end with the block.

    Args:
        recipe: Names the trackers.
        run: Where their files go.
        on_event: What is told first.
    """
    followers = [Follower(tracker.name, _opening(tracker, recipe, run)) for tracker in recipe.trackers]

    def report_and_track(event: Event) -> None:
        on_event(event)
        if isinstance(event, StepMetrics | ValidationResult):
            for follower in followers:
                follower.send({"step": event.step, "values": _values(event)})

    seconds = FINISH_SECONDS_IF_STOPPED
    try:
        yield report_and_track
        for follower in followers:
            follower.send(ENDED)
        seconds = FINISH_SECONDS
    finally:
        if followers:
            on_event(Phase(f"finishing {', '.join(follower.name for follower in followers)}"))
            _finish(followers, seconds)


def _finish(followers: Sequence[Follower], seconds: float) -> None:
    """Let all of them send the rest at the same time, and end those that do not."""
    for follower in followers:
        follower.close()
    deadline = time.monotonic() + seconds
    try:
        for follower in followers:
            follower.wait(deadline)
    finally:
        for follower in followers:
            follower.kill()


def _opening(tracker: TrackerSection, recipe: Recipe, run: RunDirectory) -> Opening:
    made = run.marker.read_bytes() if run.marker.is_file() else b""
    return Opening(
        section=tracker.model_dump(mode="json"),
        folder=str(run.trackers / tracker.name),
        name=str(recipe.run.name),
        id=sha256(str(run.path).encode() + made).hexdigest()[:12],
        recipe=recipe.model_dump(mode="json"),
    )


def _values(event: StepMetrics | ValidationResult) -> dict[str, float]:
    """An event's finite numbers under the names that trackers group by: `train/loss`, `validation/loss`."""
    group = "train" if isinstance(event, StepMetrics) else "validation"
    left_out = ("event", "step", "total_steps", "seconds", "rows")
    numbers = {name: value for name, value in event.to_json().items() if name not in left_out and value is not None}
    return {f"{group}/{name}": value for name, value in numbers.items()}


class Follower:
    """A tracker's process.

    Args:
        name: Of the tracker, for messages.
        opening: What it is told first.
    """

    def __init__(self, name: str, opening: Opening) -> None:
        self.name = name
        self._process: subprocess.Popen[bytes] | None = None
        self._replies = b""
        try:
            os.makedirs(opening.folder, exist_ok=True)
            self._process = _start(opening)
        except OSError as error:
            self._warn(f"it could not be started: {error.strerror}")

    def send(self, record: Mapping[str, Any]) -> None:
        """Tell it something, without ever waiting for it."""
        self._listen()
        if self._process is None:
            return
        assert self._process.stdin is not None
        try:
            # Less than a pipe takes at once: written whole or not at all.
            os.write(self._process.stdin.fileno(), json.dumps(record).encode() + b"\n")
        except BlockingIOError:
            self._give_up("it does not keep up")
        except OSError:
            self._listen()
            self._give_up("its process has ended")

    def close(self) -> None:
        """Nothing follows."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def wait(self, deadline: float) -> None:
        """Let it send the rest until `deadline`, by the monotonic clock."""
        if self._process is None:
            return
        try:
            code = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = LATE
        self._listen()
        if code == LATE:
            self._give_up("it was not done in time at the end")
        elif code:
            self._give_up(f"its process has ended with {code}")

    def kill(self) -> None:
        """End it and what it has started, if they are there."""
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
        """Tell what the process has said since the last time."""
        if self._process is None:
            return
        assert self._process.stdout is not None
        with suppress(BlockingIOError):
            while said := os.read(self._process.stdout.fileno(), 1 << 16):
                self._replies += said
        *lines, self._replies = self._replies.split(b"\n")
        for reply in map(json.loads, lines):
            if "where" in reply:
                logger.info("%s follows the run: %s", self.name, redacted(reply["where"]))
            else:
                self._give_up(reply["failed"])
                return

    def _give_up(self, why: str) -> None:
        """End it and warn, once."""
        if self._process is not None:
            self.kill()
            self._warn(why)

    def _warn(self, why: str) -> None:
        first_line = redacted(why).strip().partition("\n")[0][:200]
        logger.warning("%s no longer follows the run, which goes on without it: %s", self.name, first_line)


def _start(opening: Opening) -> subprocess.Popen[bytes]:
    """A process with the opening in its pipe; neither end of it is ever waited for."""
    path = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "finetune.run.trackers.clients"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        cwd=opening.folder,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path, "WANDB_CACHE_DIR": opening.folder},
        start_new_session=True,  # Ctrl-C is for the run, which then tells it to finish
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(OSError, AttributeError):  # Linux alone can widen a pipe
        fcntl.fcntl(process.stdin, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    process.stdin.write(json.dumps(asdict(opening)).encode() + b"\n")
    os.set_blocking(process.stdin.fileno(), False)
    os.set_blocking(process.stdout.fileno(), False)
    return process

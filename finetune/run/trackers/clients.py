"""Clients of the trackers' packages; run as a module in the process that `TrackerProcess` starts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from queue import SimpleQueue
from threading import Thread, Timer
from typing import Any, ClassVar, Protocol

from pydantic import TypeAdapter

from finetune.recipe.sections.section import Section
from finetune.recipe.sections.tracking import Mlflow, TensorBoard, Tracker, Trackio, Wandb
from finetune.resolve import build
from finetune.run.trackers.process import ENDED, FINISH_SECONDS, LATE, TrackerSetup


class TrackerClient(Protocol):
    """A tracker's client for one run.

    Attributes:
        where: URL or command that shows the tracked run.
    """

    where: str

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the metrics of a step."""

    def finish(self, is_done: bool) -> None:
        """Close the tracked run; `is_done` tells success from failure."""


class TensorBoardTracker:
    """TensorBoard event files. A resumed run adds a file, whose steps replace those after the checkpoint."""

    def __init__(self, section: TensorBoard, setup: TrackerSetup) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(setup.folder)
        self.where = f"tensorboard --logdir {setup.folder}"

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, is_done: bool) -> None:
        """Flush and close the file."""
        self._writer.close()


class WandbTracker:
    """A run of Weights & Biases, resumed by its id."""

    _QUIET: ClassVar[dict[str, Any]] = {
        "console": "off",
        "silent": True,
        "disable_git": True,
        "disable_code": True,
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        "x_disable_stats": True,
    }

    def __init__(self, section: Wandb, setup: TrackerSetup) -> None:
        import wandb

        self._run = wandb.init(
            project=section.project,
            name=setup.name,
            id=setup.id,
            resume="allow",
            dir=setup.folder,
            mode="offline" if section.offline else None,
            config=setup.recipe,
            settings=wandb.Settings(**self._QUIET),
        )
        self.where = self._run.url or f"wandb sync {Path(self._run.dir).parent}"

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics. After a resume, steps that W&B already has are sent again, with the same values."""
        self._run.log(dict(values), step=step)

    def finish(self, is_done: bool) -> None:
        """Send pending data."""
        self._run.finish(exit_code=0 if is_done else 1)


class MlflowTracker:
    """A run of MLflow, found by a tag on resume."""

    _PARAMETERS_AT_ONCE = 100  # the limit of MLflow's batch API
    _TAG = "ft.run"

    def __init__(self, section: Mlflow, setup: TrackerSetup) -> None:
        import mlflow

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if section.offline or not uri:
            uri = f"sqlite:///{setup.folder}/mlflow.db"
            mlflow.set_tracking_uri(uri)
        mlflow.set_experiment(section.experiment)
        found = mlflow.search_runs(filter_string=f"tags.`{self._TAG}` = '{setup.id}'", output_format="list")
        self._mlflow = mlflow
        if found:
            mlflow.start_run(run_id=found[0].info.run_id)
        else:
            mlflow.start_run(run_name=setup.name, tags={self._TAG: setup.id})
            parameters = list(flattened(setup.recipe))
            for first in range(0, len(parameters), self._PARAMETERS_AT_ONCE):
                mlflow.log_params(dict(parameters[first : first + self._PARAMETERS_AT_ONCE]))
        self.where = f"mlflow ui --backend-store-uri {uri}" if uri.startswith("sqlite") else uri

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics."""
        self._mlflow.log_metrics(dict(values), step=step)

    def finish(self, is_done: bool) -> None:
        """Close the run."""
        self._mlflow.end_run("FINISHED" if is_done else "FAILED")


class TrackioTracker:
    """A run of Trackio, resumed by its name."""

    def __init__(self, section: Trackio, setup: TrackerSetup) -> None:
        import trackio

        self._run = trackio.init(
            project=section.project,
            name=f"{setup.name}-{setup.id}",
            space_id=section.space,
            config=setup.recipe,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.where = f"trackio show --project {section.project}"

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics."""
        self._run.log(dict(values), step=step)

    def finish(self, is_done: bool) -> None:
        """Send pending data."""
        self._run.finish()


def flattened(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values as pairs of dotted key and plain value."""
    if isinstance(values, dict | list) and values:
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from flattened(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, values


def follow(lines: Iterator[str], reply: Any) -> None:
    """Open a tracker, log the metrics of each line, and close it after the last.

    Args:
        lines: JSON objects: a `TrackerSetup`, then `{"step", "values"}` for each step, then `ENDED` after success.
        reply: Called with a dictionary: `where` the run can be seen.
    """
    setup = TrackerSetup(**json.loads(next(lines)))
    section: Section = TypeAdapter(Tracker).validate_python(setup.section)
    # Calls the class that the section names as a string: the recipe does not import this module.
    tracker: TrackerClient = build(section, setup)
    reply({"where": tracker.where})
    is_done = False
    for line in lines:
        record = json.loads(line)
        if record == ENDED:
            is_done = True
        else:
            tracker.log(record["values"], record["step"])
    tracker.finish(is_done)


def received() -> Iterator[str]:
    """Lines of standard input, read by a thread as they arrive: the pipe stays empty while a tracker is slow.

    At the end of input a timer bounds the time that this process may take to send pending data.
    """
    lines: SimpleQueue[str | None] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put(None)
        timer = Timer(FINISH_SECONDS, os._exit, [LATE])
        timer.daemon = True
        timer.start()

    Thread(target=read, daemon=True).start()
    return iter(lines.get, None)


def main() -> None:
    """Serve one tracker of one run. Output of its package is discarded: it may contain secrets."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "w", encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)

    def reply(record: dict[str, str]) -> None:
        replies.write(json.dumps(record) + "\n")
        replies.flush()

    try:
        follow(received(), reply)
    except BaseException as error:  # SystemExit too: some packages call sys.exit
        reply({"failed": f"{type(error).__name__}: {error}"})
    os._exit(0)  # without waiting for threads of the package


if __name__ == "__main__":
    main()

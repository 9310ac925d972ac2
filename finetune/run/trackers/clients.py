"""What each tracker's package is told, in a process of its own that `tracking` starts; run as a module."""

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
from finetune.run.trackers.process import ENDED, FINISH_SECONDS, LATE, Opening


class Followed(Protocol):
    """A tracker's side of one run.

    Attributes:
        where: Where a person finds it.
    """

    where: str

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add numbers of a step."""

    def finish(self, is_done: bool) -> None:
        """The run has ended, at its end or before."""


class TensorBoardTracker:
    """Event files. A run that goes on adds a file, whose steps take the place of those that were lost."""

    def __init__(self, section: TensorBoard, opening: Opening) -> None:
        from tensorboard.summary import Generator

        self._writer = Generator(opening.folder)
        self.where = f"tensorboard --logdir {opening.folder}"

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, is_done: bool) -> None:
        """Write the rest."""
        self._writer.close()


class WandbTracker:
    """A run of Weights & Biases, which is gone on with by its id."""

    _QUIET: ClassVar[dict[str, Any]] = {
        "console": "off",
        "silent": True,
        "disable_git": True,
        "disable_code": True,
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        "x_disable_stats": True,
    }

    def __init__(self, section: Wandb, opening: Opening) -> None:
        import wandb

        self._run = wandb.init(
            project=section.project,
            name=opening.name,
            id=opening.id,
            resume="allow",
            dir=opening.folder,
            mode="offline" if section.offline else None,
            config=opening.recipe,
            settings=wandb.Settings(**self._QUIET),
        )
        self.where = self._run.url or f"wandb sync {Path(self._run.dir).parent}"

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add numbers; those of steps that were told before the run stopped are there, and are the same."""
        self._run.log(dict(values), step=step)

    def finish(self, is_done: bool) -> None:
        """Send the rest."""
        self._run.finish(exit_code=0 if is_done else 1)


class MlflowTracker:
    """A run of MLflow, which is found again by a tag."""

    _PARAMETERS_AT_ONCE = 100
    _TAG = "ft.run"

    def __init__(self, section: Mlflow, opening: Opening) -> None:
        import mlflow

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if section.offline or not uri:
            uri = f"sqlite:///{opening.folder}/mlflow.db"
            mlflow.set_tracking_uri(uri)
        mlflow.set_experiment(section.experiment)
        found = mlflow.search_runs(filter_string=f"tags.`{self._TAG}` = '{opening.id}'", output_format="list")
        self._mlflow = mlflow
        if found:
            mlflow.start_run(run_id=found[0].info.run_id)
        else:
            mlflow.start_run(run_name=opening.name, tags={self._TAG: opening.id})
            parameters = list(flattened(opening.recipe))
            for first in range(0, len(parameters), self._PARAMETERS_AT_ONCE):
                mlflow.log_params(dict(parameters[first : first + self._PARAMETERS_AT_ONCE]))
        self.where = f"mlflow ui --backend-store-uri {uri}" if uri.startswith("sqlite") else uri

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add numbers."""
        self._mlflow.log_metrics(dict(values), step=step)

    def finish(self, is_done: bool) -> None:
        """Close the run."""
        self._mlflow.end_run("FINISHED" if is_done else "FAILED")


class TrackioTracker:
    """A run of Trackio, which is gone on with by its name."""

    def __init__(self, section: Trackio, opening: Opening) -> None:
        import trackio

        self._run = trackio.init(
            project=section.project,
            name=f"{opening.name}-{opening.id}",
            space_id=section.space,
            config=opening.recipe,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.where = f"trackio show --project {section.project}"

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add numbers."""
        self._run.log(dict(values), step=step)

    def finish(self, is_done: bool) -> None:
        """Send the rest."""
        self._run.finish()


def flattened(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and plain values of nested ones."""
    if isinstance(values, dict | list) and values:
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from flattened(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, values


def follow(lines: Iterator[str], reply: Any) -> None:
    """Open a tracker with the first line, log what the next ones say, and finish it.

    Args:
        lines: JSON objects: an `Opening`, then steps with their numbers, then how the run ended.
        reply: Called with a dictionary: `where` the run can be seen.
    """
    opening = Opening(**json.loads(next(lines)))
    section: Section = TypeAdapter(Tracker).validate_python(opening.section)
    tracker: Followed = build(section, opening)
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
    """Lines of standard input, read by a thread as they come, so that who writes never waits for a tracker.

    When they end, so does this process, with a delay for what is left to send.
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
    """Follow one run for one tracker; whatever the package prints goes nowhere, for it may name a secret."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "w", encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)

    def reply(record: dict[str, str]) -> None:
        replies.write(json.dumps(record) + "\n")
        replies.flush()

    try:
        follow(received(), reply)
    except BaseException as error:  # SystemExit too: its package may think that it is the program
        reply({"failed": f"{type(error).__name__}: {error}"})
    os._exit(0)  # not to wait for threads that a package has left


if __name__ == "__main__":
    main()

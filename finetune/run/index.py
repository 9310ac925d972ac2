"""Index of the runs in a folder: state, size on disk, and removable files."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.run.checkpoints import Checkpoints
from finetune.run.directory import RunDirectory
from finetune.run.events import BestCheckpoint, Recorded, StepMetrics, ValidationResult
from finetune.run.history import recorded_events
from finetune.storage.files import disk_faults

State = Literal["training", "finished", "resumable", "failed", "never started"]


@dataclass(frozen=True)
class RunSummary:
    """Summary of one run.

    Attributes:
        path: The run directory.
        state: `training` while a process holds the lock; `resumable` if the run ended early and has a checkpoint.
        step: Optimizer steps done.
        loss: Loss of the last step, in nats; None before the first.
        validation_loss: Validation loss of the result, or else the latest, in nats; None if never measured.
        size_bytes: Size of all its files.
    """

    path: Path
    state: State
    step: int
    loss: float | None
    validation_loss: float | None
    size_bytes: int


@dataclass(frozen=True)
class Removable:
    """A file or folder that can be deleted without loss of results.

    Attributes:
        path: File or folder.
        why: Reason, for the user.
        size_bytes: Bytes that are freed.
    """

    path: Path
    why: str
    size_bytes: int


def runs_in(folder: Path) -> list[RunDirectory]:
    """The runs directly in a folder, by name; the folder itself if it is a run."""
    markers = [folder / "run.json", *sorted(folder.glob("*/run.json"))]
    return [RunDirectory(marker.parent.absolute()) for marker in markers if marker.is_file()]


def summarize(run: RunDirectory) -> RunSummary:
    """Read the summary of a run from its files."""
    last = {type(event): event for event in recorded_events(run)}
    step, result = last.get(StepMetrics), last.get(BestCheckpoint) or last.get(ValidationResult)
    return RunSummary(
        path=run.path,
        state=state_of(run),
        step=step.step if isinstance(step, StepMetrics) else 0,
        loss=_loss(step),
        validation_loss=_loss(result),
        size_bytes=_size(run.path),
    )


def removable(run: RunDirectory) -> list[Removable]:
    """Removable files of a run that is not training: leftovers of killed processes, checkpoints of a finished run.

    Results, records and the checkpoints of a resumable run are never included.
    """
    state = state_of(run)
    if state == "training":
        return []
    found = [
        (entry, "left by a killed process")
        for folder in (run.path, run.checkpoints, run.exported)
        if folder.is_dir() and not folder.is_symlink()
        for entry in folder.iterdir()
        if entry.name.startswith(".") and not entry.is_symlink()
    ]
    if state == "finished" and run.checkpoints.is_dir() and not run.checkpoints.is_symlink():
        found = [(entry, why) for entry, why in found if entry.parent != run.checkpoints]
        found.append((run.checkpoints, "the run is finished; they would only serve to train it for longer"))
    return [Removable(entry, why, _size(entry)) for entry, why in found]


def remove(found: Removable) -> None:
    """Delete the file or folder.

    Raises:
        EnvironmentFault: It cannot be removed.
    """
    with disk_faults(found.path, "check permissions"):
        if found.path.is_dir():
            shutil.rmtree(found.path)
        else:
            found.path.unlink()


def state_of(run: RunDirectory) -> State:
    """State of a run, from its files and its lock."""
    if run.is_locked:
        return "training"
    if run.is_finished:
        return "finished"
    if Checkpoints(run.checkpoints).any_committed:
        return "resumable"
    return "failed" if run.metrics.is_file() else "never started"


def _loss(event: Recorded | None) -> float | None:
    """The loss of an event; None if it has none, or one that is not finite."""
    loss = getattr(event, "loss", None)
    return loss if loss is not None and math.isfinite(loss) else None


def _size(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(entry.lstat().st_size for entry in path.rglob("*") if not entry.is_dir())

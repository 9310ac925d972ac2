"""Runs in a folder: how far each has come, what it takes, and what of it can go."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.run.checkpoints import Checkpoints
from finetune.run.directory import RunDirectory
from finetune.run.events import BestCheckpoint, StepMetrics, ValidationResult
from finetune.run.history import records

State = Literal["training", "finished", "can go on", "failed", "never started"]


@dataclass(frozen=True)
class RunSummary:
    """One run.

    Attributes:
        path: Its directory.
        state: `training` while a process holds its lock; `can go on` after a signal or a crash that left a checkpoint.
        step: Optimizer steps that are done.
        loss: Of the last step.
        validation_loss: Of the result, or the last that was measured.
        size_bytes: Of all its files.
    """

    path: Path
    state: State
    step: int
    loss: float | None
    validation_loss: float | None
    size_bytes: int


@dataclass(frozen=True)
class Removable:
    """Something that a run can do without.

    Attributes:
        path: File or folder.
        why: Why it can go.
        size_bytes: What is won.
    """

    path: Path
    why: str
    size_bytes: int


def runs_in(folder: Path) -> list[RunDirectory]:
    """The runs in a folder, or the one that it is, by name."""
    markers = [folder / "run.json", *sorted(folder.glob("*/run.json"))]
    return [RunDirectory(marker.parent.absolute()) for marker in markers if marker.is_file()]


def summarize(run: RunDirectory) -> RunSummary:
    """What a run has come to."""
    steps, validations = _last_lines(run)
    return RunSummary(
        path=run.path,
        state=state_of(run),
        step=steps.get("step", 0),
        loss=steps.get("loss"),
        validation_loss=validations.get("loss"),
        size_bytes=_size(run.path),
    )


def removable(run: RunDirectory) -> list[Removable]:
    """What a run that nobody trains can do without: checkpoints of a finished one, and what killed processes left.

    Results, records and the checkpoints of a run that can go on are never among it.
    """
    state = state_of(run)
    if state == "training":
        return []
    found = [
        (entry, "left by a process that was killed")
        for folder in (run.path, run.checkpoints)
        if folder.is_dir()
        for entry in folder.iterdir()
        if entry.name.startswith(".") and not entry.is_symlink()
    ]
    if state == "finished" and run.checkpoints.is_dir() and not run.checkpoints.is_symlink():
        found = [(entry, why) for entry, why in found if entry.parent != run.checkpoints]
        found.append((run.checkpoints, "the run is finished; with them it could only be made longer"))
    return [Removable(entry, why, _size(entry)) for entry, why in found]


def remove(found: Removable) -> None:
    """Remove it."""
    if found.path.is_dir():
        shutil.rmtree(found.path)
    else:
        found.path.unlink()


def state_of(run: RunDirectory) -> State:
    """How far a run has come, by its files and its lock."""
    if run.is_locked:
        return "training"
    if run.is_finished:
        return "finished"
    if Checkpoints(run.checkpoints).any_committed:
        return "can go on"
    return "failed" if run.metrics.is_file() else "never started"


def _last_lines(run: RunDirectory) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last step of `metrics.jsonl`, and where the held-out loss of the result stands; empty where there is none."""
    last = {str(line.get("event")): line for line in records(run.metrics)}
    return last.get(StepMetrics.kind, {}), last.get(BestCheckpoint.kind) or last.get(ValidationResult.kind, {})


def _size(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(entry.lstat().st_size for entry in path.rglob("*") if not entry.is_dir())

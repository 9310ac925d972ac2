"""What a name on the command line means: a run, a checkpoint of one, a folder of trained weights, or a model.

Answered without torch, so that a wrong name is told at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from finetune.errors import UsageError
from finetune.run.checkpoints import MANIFEST, Checkpoints
from finetune.run.directory import TRAINED_RECORD, RunDirectory


class Kind(Enum):
    """Of what a name means."""

    RUN = "a finished run"
    CHECKPOINT = "a checkpoint of a run"
    WEIGHTS = "a folder of trained weights with their record"
    MODEL = "a model"


@dataclass(frozen=True)
class ModelRef:
    """Something to generate with.

    Attributes:
        kind: What it is.
        given: As it was written.
        path: Its folder, absolute; for a model the folder or file that it may be.
        label: What it is called in answers.
    """

    kind: Kind
    given: str
    path: Path
    label: str


def named(names: Sequence[str]) -> list[ModelRef]:
    """What names mean; each gets its last part for a label where that tells it from the others.

    Raises:
        UsageError: One means nothing, or stands there twice.
    """
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError("this stands there twice", where=twice, hint="name each once")
    found = [_named(name) for name in names]
    labels = [each.label for each in found]
    return [replace(each, label=each.given) if labels.count(each.label) > 1 else each for each in found]


def _named(name: str) -> ModelRef:
    path = Path(name).expanduser().absolute()
    label = path.name
    if (path / MANIFEST).is_file():
        return ModelRef(Kind.CHECKPOINT, name, path, f"{path.parent.parent.name}/{label}")
    if (path / TRAINED_RECORD).is_file():
        is_of_run = RunDirectory(path.parent).marker.is_file()
        return _named(str(path.parent)) if is_of_run else ModelRef(Kind.WEIGHTS, name, path, label)
    if (path / "adapter_config.json").is_file():
        raise UsageError(
            f"this adapter has no {TRAINED_RECORD}, which says what it is and what it was trained on",
            where=name,
            hint="name a run of ft, or the adapter's folder as ft train wrote it",
        )
    run = RunDirectory(path)
    if run.marker.is_file():
        _refuse_unfinished(run)
        return ModelRef(Kind.RUN, name, path, label)
    if not path.exists() and any(path.parent.glob("*/run.json")):
        RunDirectory.open(path)  # a slip of the pen among runs: says which there are
    if path.is_dir() and not (path / "config.json").is_file():
        inside = sorted(file.parent.name for file in path.glob("*/run.json"))
        raise UsageError(
            "this folder holds no run, no trained weights and no model",
            where=name,
            hint=f"runs in it: {', '.join(inside)}" if inside else "name a run's folder, or a model's with config.json",
        )
    return ModelRef(Kind.MODEL, name, path, label)


def _refuse_unfinished(run: RunDirectory) -> None:
    if any(run.trained(is_whole_model).is_dir() for is_whole_model in (False, True)):
        return
    checkpoints = Checkpoints(run.checkpoints).folders()
    raise UsageError(
        "the run has no trained weights: it did not finish",
        where=str(run.path),
        hint=run.resume_command + (f", or name a checkpoint, such as {checkpoints[-1]}" if checkpoints else ""),
    )

"""Model references on the command line: a run, a checkpoint, a folder of trained weights, or a model.

Does not import torch, so a wrong reference is reported at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from finetune.errors import UsageError
from finetune.run.checkpoints import MANIFEST, Checkpoints
from finetune.run.directory import TRAINED_RECORD, RunDirectory
from finetune.storage.home import expand_home


class Kind(Enum):
    """Kinds of references."""

    RUN = "a finished run"
    CHECKPOINT = "a checkpoint of a run"
    WEIGHTS = "a folder of trained weights with their record"
    MODEL = "a model"


@dataclass(frozen=True)
class ModelRef:
    """A resolved reference to a model.

    Attributes:
        kind: Its kind.
        given: The reference as it was written.
        path: The absolute folder. For a model: the path that the reference would have; it may be a hub id instead.
        label: Its short name in outputs.
    """

    kind: Kind
    given: str
    path: Path
    label: str


def resolve_model_refs(names: Sequence[str]) -> list[ModelRef]:
    """Resolve references; the label of each is its last path component, or all of it where two share the component.

    Raises:
        UsageError: A reference is none of the kinds, or is given twice.
    """
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError("this is given twice", where=twice, hint="name each once")
    found = [_resolved(name) for name in names]
    labels = [each.label for each in found]
    return [replace(each, label=each.given) if labels.count(each.label) > 1 else each for each in found]


def _resolved(name: str) -> ModelRef:
    path = Path(expand_home(name)).absolute()
    label = path.name
    if (path / MANIFEST).is_file():
        return ModelRef(Kind.CHECKPOINT, name, path, f"{path.parent.parent.name}/{label}")
    if (path / TRAINED_RECORD).is_file():
        is_of_run = RunDirectory(path.parent).marker.is_file()
        return _resolved(str(path.parent)) if is_of_run else ModelRef(Kind.WEIGHTS, name, path, label)
    if (path / "adapter_config.json").is_file():
        raise UsageError(
            f"this adapter has no {TRAINED_RECORD}, the record of its method and base",
            where=name,
            hint="name a run of ft, or the adapter's folder as ft train wrote it",
        )
    run = RunDirectory(path)
    if run.marker.is_file():
        _refuse_unfinished(run)
        return ModelRef(Kind.RUN, name, path, label)
    if not path.exists() and any(path.parent.glob("*/run.json")):
        RunDirectory.open(path)  # probably a misspelled run: the error lists the runs of that folder
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
    error = run.unfinished()
    if checkpoints := Checkpoints(run.checkpoints).folders():
        error.hint = f"{error.hint}, or name a checkpoint, such as {checkpoints[-1]}"
    raise error

"""`ft reproduce`: train a run again and compare the weights bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune.errors import RefusedError, UsageError
from finetune.jobs.load.training_record import TrainingRecord, trained_files
from finetune.jobs.train.run import train
from finetune.recipe.load import load_recipe
from finetune.run.comparison import Difference, differences
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler, ignore
from finetune.run.provenance import file_digest
from finetune.run.signals import Interruption


@dataclass(frozen=True)
class Reproduction:
    """The result of a reproduction.

    Attributes:
        run_directory: Of the second run.
        is_identical: Whether every trained tensor is the same bit for bit.
        files: Compared, by name.
        differences: Between the runs, in versions and results too.
    """

    run_directory: Path
    is_identical: bool
    files: list[str]
    differences: list[Difference]


def reproduce(
    first: RunDirectory, again: RunDirectory, on_event: EventHandler = ignore, interruption: Interruption | None = None
) -> Reproduction:
    """Train the resolved recipe of a finished run in a directory of its own and compare the trained weights.

    On the same machine with the same versions and number of threads they are equal bit for bit.

    Args:
        first: A finished run.
        again: A directory made for the second.
        on_event: Called with every phase and step.
        interruption: Asks to save and stop.

    Raises:
        UsageError: The first run is not finished.
        RefusedError: Data or base have changed since the first run.
    """
    if not first.is_finished:
        raise UsageError("the run is not finished", where=str(first.path), hint=first.resume_command)
    recipe = load_recipe(first.recipe).recipe
    weights = first.trained(recipe.adapter.trains_base)
    train(recipe, again, on_event, interruption, TrainingRecord.read(weights).kept(weights))
    found = differences(first, again)
    changed = [difference for difference in found if difference.part == "data" or difference.key == "base fingerprint"]
    if changed:
        raise RefusedError(
            f"{changed[0].key} is not what the run was trained on: {changed[0].first} -> {changed[0].second}",
            where=str(again.path),
            hint="restore the data and base of the first run",
        )
    repeated = again.trained(recipe.adapter.trains_base)
    names = [file.name for file in trained_files(weights)]
    same = all(file_digest(weights / name) == file_digest(repeated / name) for name in names)
    return Reproduction(again.path, same, names, found)

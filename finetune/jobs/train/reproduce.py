"""`ft reproduce`: train a run again and compare the weights bit for bit."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import RefusedError
from finetune.jobs.load.training_record import TrainingRecord, trained_files
from finetune.jobs.train.run import train
from finetune.recipe.load import load_recipe
from finetune.run.attempts import changed_on_resume
from finetune.run.comparison import Difference, differences
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler, ignore
from finetune.run.provenance import file_digest
from finetune.run.signals import Interruption

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reproduction:
    """The result of a reproduction.

    Attributes:
        run_directory: Of the second run.
        is_identical: Whether every trained tensor is the same bit for bit.
        files: Compared, by name.
        differences: Between the runs, in versions and results too.
        changed: Keys that changed when the first run was resumed, each with its values in words.
    """

    run_directory: Path
    is_identical: bool
    files: list[str]
    differences: list[Difference]
    changed: list[tuple[str, str]]

    @property
    def reasons(self) -> list[str]:
        """What differs between the trainings and can explain other weights."""
        causes = [each for each in self.differences if each.part in ("recipe", "versions")]
        return [
            *_was(self.changed),
            *(f"{each.key} was {each.first} and is {each.second}" for each in causes),
        ]


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
        raise first.unfinished("the run is not finished")
    recipe = load_recipe(first.recipe).recipe
    if changed := changed_on_resume(first):
        logger.warning(
            "%s; here it is the same from the first step, so that the weights will differ", "; ".join(_was(changed))
        )
    weights = first.trained(recipe.adapter.trains_base)
    train(recipe, again, on_event, interruption, TrainingRecord.read(weights).kept(weights))
    found = differences(first, again)
    inputs = [difference for difference in found if difference.part == "data" or difference.key == "base fingerprint"]
    if inputs:
        raise RefusedError(
            f"{inputs[0].key} is not what the run was trained on: {inputs[0].first} -> {inputs[0].second}",
            where=str(again.path),
            hint="restore the data and base of the first run",
        )
    repeated = again.trained(recipe.adapter.trains_base)
    names = [file.name for file in trained_files(weights)]
    same = all(file_digest(weights / name) == file_digest(repeated / name) for name in names)
    return Reproduction(again.path, same, names, found, changed)


def _was(changed: list[tuple[str, str]]) -> list[str]:
    return [f"{key} was {values}" for key, values in changed]

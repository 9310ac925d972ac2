"""`ft sweep`: trials in sequence, each an ordinary run in the sweep's folder."""

from __future__ import annotations

import gc
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from finetune.errors import (
    DivergedError,
    OutOfMemoryError,
    RecipeError,
    RefusedError,
    Stopped,
    UnsupportedError,
    UsageError,
)
from finetune.formatting import counted
from finetune.jobs.sweep.sampler import refuse_missing_package, suggest, untried
from finetune.jobs.train.run import train
from finetune.recipe.diff import changes
from finetune.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.sweep import Swept
from finetune.report.sweep_page import sweep_page
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler
from finetune.run.signals import Interruption
from finetune.run.sweep_trials import SweepDirectory, Trial, Values
from finetune.storage.files import CHECK_DISK, check_writable, disk_faults, write_text

logger = logging.getLogger(__name__)

SHOWN = 5
"""Combinations without a trial that are listed."""

TRIAL_ERRORS = (DivergedError, OutOfMemoryError, RecipeError, UnsupportedError)
"""Errors that a trial's values can cause: only the trial fails. Any other error ends the sweep."""


class Sweep:
    """A new or resumed sweep.

    Args:
        loaded: A recipe with a section `sweep`.
        path: The sweep's folder.

    Raises:
        UsageError: The recipe has no section `sweep`.
        UnsupportedError: Optuna is not installed, or the recipe wants several processes.
        RefusedError: The folder holds something else, or a sweep of another recipe, or its record is damaged.
        EnvironmentFault: The disk is full or read-only.
    """

    def __init__(self, loaded: LoadedRecipe, path: Path) -> None:
        if loaded.recipe.sweep is None:
            raise UsageError(
                "the recipe has no section `sweep`",
                where=str(loaded.path),
                hint="add a section: sweep: {keys: [{key: optimizer.learning_rate, draw: log_uniform, "
                "low: 1e-5, high: 1e-3}]}",
            )
        if loaded.recipe.distributed.processes > 1:
            raise UnsupportedError(
                "the trials of a sweep train in one process each",
                where=str(loaded.path),
                hint="set distributed.processes to 1; the best values can be trained with more",
            )
        self.section = loaded.recipe.sweep
        refuse_missing_package(self.section)
        self.directory = SweepDirectory(path)
        self._loaded = loaded
        self._claim()

    def next_trial(self) -> Trial | None:
        """The interrupted trial, or else a new one; None if all are done."""
        trials = self.directory.trials()
        if opened := [trial for trial in trials if trial.is_open]:
            return opened[0]
        if len(trials) >= self.section.trials:
            self._report_untried(trials)
            return None
        values = suggest(self._loaded.recipe, self.section, trials)
        if values is None:
            logger.info("every combination of values was tried: %s", counted(len(trials), "trial"))
            return None
        return self.directory.begin(values)

    def _report_untried(self, trials: Sequence[Trial]) -> None:
        """List the combinations that the number of trials leaves out, if they can be counted."""
        left = list(untried(self.section, trials))
        if left:
            shown = "; ".join(", ".join(f"{key} {value}" for key, value in values.items()) for values in left[:SHOWN])
            logger.info(
                "%s without a trial: %s%s -> raise sweep.trials to %d for all",
                counted(len(left), "combination"),
                shown,
                "; ..." if len(left) > SHOWN else "",
                len(trials) + len(left),
            )

    def run_of(self, trial: Trial) -> RunDirectory:
        """The run directory of a trial; created if it does not exist."""
        if RunDirectory(trial.path).marker.is_file():
            return RunDirectory.open(trial.path)
        run = RunDirectory.create(trial.path)
        with run.removed_unless_attempted():
            write_text(run.recipe_as_written, self._loaded.text)
        return run

    def train(
        self, trial: Trial, run: RunDirectory, on_event: EventHandler, interruption: Interruption | None = None
    ) -> None:
        """Train a trial to its end, or record that its values cannot be trained.

        Args:
            trial: An open trial.
            run: Its run directory.
            on_event: Receives the events of the run.
            interruption: Whether to save and stop.

        Raises:
            Stopped: A signal ended it; it resumes when the sweep does.
            FinetuneError: An error that its values do not cause.
        """
        try:
            recipe = self._recipe_of(trial.values, trial.name)
            train(recipe, run, on_event, interruption)
        except Stopped as stopped:
            raise Stopped(stopped.what, where=trial.name, hint="resume with the same command") from None
        except TRIAL_ERRORS as failure:
            logger.warning("%s has no result: %s", trial.name, failure.lines()[0])
            self.directory.fail(trial, failure.lines()[0])
            if not run.metrics.is_file():  # nothing was trained
                shutil.rmtree(run.path, ignore_errors=True)
        finally:
            gc.collect()  # frees reference cycles of this trial's model before the next one loads
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        write_text(self.directory.page, sweep_page(self.directory, self._loaded.recipe))

    def _claim(self) -> None:
        directory = self.directory
        if directory.recipe.is_file():
            begun = load_recipe(directory.recipe).recipe
            if begun.sweep is not None and self.section.sampler is None:  # versions up to 0.1 wrote tpe
                self.section = self.section.model_copy(update={"sampler": begun.sweep.sampler})
            now = self._loaded.recipe.model_copy(update={"sweep": self.section})
            if found := changes(_ignoring(begun), _ignoring(now)):
                raise RefusedError(
                    f"the sweep was started with another recipe: {'; '.join(map(str, found))}",
                    where=str(directory.path),
                    hint="undo the change, or choose another --sweep-dir",
                )
            self._refuse_other_trials()
            check_writable(directory.record)
            return
        if directory.path.exists() and (not directory.path.is_dir() or any(directory.path.iterdir())):
            raise RefusedError(
                "the folder is not empty and holds no sweep",
                where=str(directory.path),
                hint="choose another --sweep-dir",
            )
        check_writable(directory.record, f"{CHECK_DISK}, or choose another --sweep-dir")
        with disk_faults(directory.path):
            directory.path.mkdir(parents=True, exist_ok=True)
        write_text(directory.recipe, dump_recipe(self._loaded.recipe))

    def _refuse_other_trials(self) -> None:
        """Check that recorded trials have a value in the range of each key, as the sampler and the page expect."""
        swept = {each.key: each for each in self.section.keys}
        for trial in self.directory.trials():
            keys = [key for key in swept.keys() | trial.values.keys() if not _holds(swept.get(key), trial.values, key)]
            if keys:
                raise RefusedError(
                    f"trial {trial.number} has no value of the sweep for {min(keys)}",
                    where=str(self.directory.record),
                    hint="restore the file, or choose another --sweep-dir",
                )

    def _recipe_of(self, values: Values, name: str) -> Recipe:
        """The recipe of a trial: without the section `sweep`, and with the trial's values."""
        overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        recipe = load_recipe(self._loaded.path, [*self._loaded.overrides, *overrides]).recipe
        where = recipe.run.model_copy(update={"name": name, "directory": str(self.directory.path)})
        return recipe.model_copy(update={"sweep": None, "run": where})


def _holds(swept: Swept | None, values: Values, key: str) -> bool:
    return swept is not None and key in values and swept.holds(values[key])


def _ignoring(recipe: Recipe) -> Recipe:
    """A recipe without the values that may change when a sweep resumes: the number of trials, and the run's name."""
    assert recipe.sweep is not None
    sweep = recipe.sweep.model_copy(update={"trials": 1})
    return recipe.model_copy(update={"sweep": sweep, "run": recipe.run.model_copy(update={"name": "sweep"})})

"""`ft sweep`: trials in sequence, each an ordinary run in the sweep's folder."""

from __future__ import annotations

import gc
import json
import logging
import math
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
from finetune.jobs.sweep.goal import Goal
from finetune.jobs.sweep.sampler import refuse_missing_package, suggest, untried
from finetune.jobs.train.run import train
from finetune.recipe.diff import changes
from finetune.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.sweep import Swept
from finetune.report.sweep_page import sweep_page
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler
from finetune.run.history import History
from finetune.run.signals import Interruption
from finetune.run.sweep_trials import VALIDATION_LOSS, SweepDirectory, Trial, TrialRun, Values
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
        UsageError: The recipe has no section `sweep`, or its goal is not measured.
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
        with loaded.locating_errors():
            self.goal = Goal.of(loaded.recipe)
        self.directory = SweepDirectory(path, self.section, str(self.goal or VALIDATION_LOSS))
        self._loaded = loaded
        self._claim()

    def next_run(self) -> tuple[Trial, TrialRun] | None:
        """The interrupted run, or else the next one of its trial, or else the first of a new trial; None at the end."""
        trial = self._next_trial()
        return (trial, trial.open_run) if trial is not None and trial.open_run is not None else None

    def _next_trial(self) -> Trial | None:
        trials = self.directory.trials()
        if opened := [trial for trial in trials if trial.open_run]:
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

    def directory_of(self, run: TrialRun) -> RunDirectory:
        """The directory of a run; created if it does not exist."""
        if RunDirectory(run.path).marker.is_file():
            return RunDirectory.open(run.path)
        directory = RunDirectory.create(run.path)
        with directory.removed_unless_attempted():
            write_text(directory.recipe_as_written, self._loaded.text)
        return directory

    def train(
        self, trial: Trial, run: TrialRun, on_event: EventHandler, interruption: Interruption | None = None
    ) -> None:
        """Train a run to its end and measure its goal, or record that the values of its trial cannot be trained.

        Args:
            trial: An open trial.
            run: Its open run.
            on_event: Receives the events of the run.
            interruption: Whether to save and stop.

        Raises:
            Stopped: A signal ended it; it resumes when the sweep does.
            FinetuneError: An error that its values do not cause.
        """
        directory = self.directory_of(run)
        try:
            if not directory.is_finished:
                train(self._recipe_of(trial, run), directory, on_event, interruption)
                gc.collect()  # frees the model before the evaluation loads one
            self._measure(trial, run, directory, on_event)
        except Stopped as stopped:
            raise Stopped(stopped.what, where=run.name, hint="resume with the same command") from None
        except TRIAL_ERRORS as failure:
            logger.warning("%s has no result: %s", run.name, failure.lines()[0])
            self.directory.fail(trial, failure.lines()[0])
            if not directory.metrics.is_file():  # nothing was trained
                shutil.rmtree(run.path, ignore_errors=True)
        finally:
            gc.collect()  # frees reference cycles of this trial's model before the next one loads
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        write_text(self.directory.page, sweep_page(self.directory))

    def _measure(self, trial: Trial, run: TrialRun, directory: RunDirectory, on_event: EventHandler) -> None:
        """Record the goal of a finished run, or that it has none: such a trial would never end."""
        if self.goal is not None and math.isfinite(score := self.goal.measure(directory, on_event)):
            self.directory.score(trial, run, score)
        elif self.goal is not None or History.of(directory).result is None:
            self.directory.fail(trial, f"{run.name} has no finite {self.directory.goal}")

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

    def _recipe_of(self, trial: Trial, run: TrialRun) -> Recipe:
        """The recipe of a run: without the section `sweep`, with the trial's values and the seed of the repeat."""
        overrides = [f"{key}={json.dumps(value)}" for key, value in trial.values.items()]
        recipe = load_recipe(self._loaded.path, [*self._loaded.overrides, *overrides]).recipe
        if run.repeat > 1:
            seed = recipe.training.seed + run.repeat - 1
            training = recipe.training.model_copy(update={"seed": seed})
            data = recipe.data.model_copy(update={"sample_seed": recipe.sample_seed})  # the same rows in all repeats
            recipe = recipe.model_copy(update={"training": training, "data": data})
        where = recipe.run.model_copy(update={"name": run.name, "directory": str(self.directory.path)})
        return recipe.model_copy(update={"sweep": None, "run": where})


def _holds(swept: Swept | None, values: Values, key: str) -> bool:
    return swept is not None and key in values and swept.holds(values[key])


def _ignoring(recipe: Recipe) -> Recipe:
    """A recipe without the values that may change when a sweep resumes: trials, repeats, and the run's name."""
    assert recipe.sweep is not None
    sweep = recipe.sweep.model_copy(update={"trials": 1, "repeats": 1})
    return recipe.model_copy(update={"sweep": sweep, "run": recipe.run.model_copy(update={"name": "sweep"})})

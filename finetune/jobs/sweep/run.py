"""`ft sweep`: one trial after the other, each a run like any other, in a folder of the sweep."""

from __future__ import annotations

import gc
import json
import logging
import shutil
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
from finetune.jobs.sweep.sampler import draw, refuse_missing_package
from finetune.jobs.train.run import train
from finetune.recipe.diff import changes
from finetune.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from finetune.recipe.recipe import Recipe
from finetune.report.sweep_page import sweep_page
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler
from finetune.run.signals import Interruption
from finetune.run.sweep_trials import SweepDirectory, Trial, Values
from finetune.storage.files import disk_faults, write_text

logger = logging.getLogger(__name__)

OF_ITS_VALUES = (DivergedError, OutOfMemoryError, RecipeError, UnsupportedError)
"""What a trial can fail of because of what it tries; anything else would befall all of them."""


class Sweep:
    """A sweep that is begun, or gone on with.

    Args:
        loaded: A recipe with a section `sweep`.
        path: The sweep's folder.

    Raises:
        UsageError: The recipe has no such section.
        UnsupportedError: Optuna is not installed, or the recipe wants several processes.
        RefusedError: The folder is in use for something else, or for a sweep of another recipe.
    """

    def __init__(self, loaded: LoadedRecipe, path: Path) -> None:
        if loaded.recipe.sweep is None:
            raise UsageError(
                "the recipe names nothing to sweep",
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
        refuse_missing_package()
        self.section = loaded.recipe.sweep
        self.directory = SweepDirectory(path)
        self._loaded = loaded
        self._claim()

    def next_trial(self) -> Trial | None:
        """The trial that was stopped, or else a new one; None where all are done."""
        trials = self.directory.trials()
        if opened := [trial for trial in trials if trial.is_open]:
            return opened[0]
        if len(trials) >= self.section.trials:
            return None
        values = draw(self._loaded.recipe, self.section, trials)
        if values is None:
            logger.warning("every combination of values was tried; the sweep ends after %d trials", len(trials))
            return None
        return self.directory.begin(values)

    def run_of(self, trial: Trial) -> RunDirectory:
        """The run directory of a trial, made if it is not there."""
        if RunDirectory(trial.path).marker.is_file():
            return RunDirectory.open(trial.path)
        run = RunDirectory.create(trial.path)
        run.recipe_as_written.write_text(self._loaded.text, encoding="utf-8")
        return run

    def train(
        self, trial: Trial, run: RunDirectory, on_event: EventHandler, interruption: Interruption | None = None
    ) -> None:
        """Train a trial to its end, or find that its values cannot be trained.

        Args:
            trial: One that is open.
            run: Its run directory.
            on_event: Told of every phase and step.
            interruption: Whether to save and stop.

        Raises:
            Stopped: A signal ended it; it is gone on with when the sweep is.
            FinetuneError: What has nothing to do with its values.
        """
        try:
            recipe = self._recipe_of(trial.values, trial.name)
            train(recipe, run, on_event, interruption)
        except Stopped as stopped:
            raise Stopped(stopped.what, where=trial.name, hint="go on with the same command") from None
        except OF_ITS_VALUES as failure:
            logger.warning("%s has no result: %s", trial.name, failure.lines()[0])
            self.directory.fail(trial, failure.lines()[0])
            if not run.metrics.is_file():  # nothing was trained
                shutil.rmtree(run.path, ignore_errors=True)
        finally:
            gc.collect()  # the next model needs the room
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        write_text(self.directory.page, sweep_page(self.directory, self._loaded.recipe))

    def _claim(self) -> None:
        directory = self.directory
        if directory.recipe.is_file():
            begun = load_recipe(directory.recipe).recipe
            if found := changes(_ignoring(begun), _ignoring(self._loaded.recipe)):
                raise RefusedError(
                    f"the sweep was begun with another recipe: {'; '.join(map(str, found))}",
                    where=str(directory.path),
                    hint="take the change back, or choose another --sweep-dir",
                )
            return
        if directory.path.exists() and (not directory.path.is_dir() or any(directory.path.iterdir())):
            raise RefusedError(
                "the folder is not empty, and holds no sweep",
                where=str(directory.path),
                hint="choose another --sweep-dir",
            )
        with disk_faults(directory.path):
            directory.path.mkdir(parents=True, exist_ok=True)
        write_text(directory.recipe, dump_recipe(self._loaded.recipe))

    def _recipe_of(self, values: Values, name: str) -> Recipe:
        """The recipe of a trial: without the sweep, and with its values in place."""
        overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        recipe = load_recipe(self._loaded.path, [*self._loaded.overrides, *overrides]).recipe
        where = recipe.run.model_copy(update={"name": name, "directory": str(self.directory.path)})
        return recipe.model_copy(update={"sweep": None, "run": where})


def _ignoring(recipe: Recipe) -> Recipe:
    """A recipe without what may change from one call of a sweep to the next: its number of trials, and its name."""
    assert recipe.sweep is not None
    sweep = recipe.sweep.model_copy(update={"trials": 1})
    return recipe.model_copy(update={"sweep": sweep, "run": recipe.run.model_copy(update={"name": "sweep"})})

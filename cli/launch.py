"""The run directory of `ft train`: a new run, or one to resume, claimed once for all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.recipe.load import LoadedRecipe
    from finetune.recipe.recipe import Recipe
    from finetune.run.directory import RunDirectory
    from finetune.run.distributed import Rank

AUTO = "auto"
"""Value of `--resume`: start the run of the recipe, or resume it."""


def claim_run(
    rank: Rank,
    loaded: LoadedRecipe | None,
    run_dir: Path | None,
    resume: str | None,
    overwrite: bool,
    overrides: list[str] | None,
) -> tuple[RunDirectory, Recipe | None]:
    """The run directory of this command and the recipe to train; no recipe if the run is finished.

    With several ranks the main one claims the directory, and the others open the same one.
    """

    def claim() -> tuple[RunDirectory, Recipe | None]:
        if loaded is None:
            return _run_to_resume(Path(str(resume)), overrides)
        return _run_of_recipe(loaded, run_dir, overwrite, resume)

    if rank.count == 1:
        return claim()
    from finetune.jobs.train.rank_consistency import claim_on_all_ranks

    return claim_on_all_ranks(rank, claim, lambda path: loaded.recipe if loaded else recipe_to_resume(path, overrides))


def recipe_to_resume(path: Path, overrides: list[str] | None) -> Recipe:
    """The recipe of a run, with the changes of `--set`."""
    from finetune.jobs.train.resume import recipe_of_run
    from finetune.run.directory import RunDirectory

    return recipe_of_run(RunDirectory.open(path), overrides or ())


def _run_to_resume(path: Path, overrides: list[str] | None) -> tuple[RunDirectory, Recipe | None]:
    """An existing run and its recipe; no recipe if the run is finished and not extended."""
    from finetune.run.directory import RunDirectory

    run = RunDirectory.open(path)
    run.refuse_links()  # before the log is opened
    return run, _unless_finished(run, recipe_to_resume(path, overrides))


def _run_of_recipe(
    loaded: LoadedRecipe, run_dir: Path | None, overwrite: bool, resume: str | None
) -> tuple[RunDirectory, Recipe | None]:
    """The run of a recipe, created if it does not exist; no recipe if the run is finished."""
    from finetune.run.directory import RunDirectory
    from finetune.run.distributed import launch_folder, publish_run_dir, published_run_dir
    from finetune.storage.files import write_text

    launch = launch_folder()
    published = published_run_dir(launch) if launch else None
    if published is not None and RunDirectory(published).marker.is_file():
        # The launcher has restarted the ranks after a crash: continue in the directory of the first attempt.
        return RunDirectory(published), loaded.recipe
    wanted = run_dir or Path(loaded.recipe.run.directory) / str(loaded.recipe.run.name)
    path = wanted if run_dir or overwrite or resume else RunDirectory.free_path(wanted)
    if resume == AUTO and RunDirectory(path.absolute()).marker.is_file():
        run = RunDirectory.open(path)
        recipe = _unless_finished(run, loaded.recipe)
    else:
        run, recipe = RunDirectory.create(path, overwrite), loaded.recipe
        with run.removed_unless_attempted():
            write_text(run.recipe_as_written, loaded.text)
    if launch is not None:
        publish_run_dir(launch, run.path)
    return run, recipe


def _unless_finished(run: RunDirectory, recipe: Recipe) -> Recipe | None:
    from finetune.jobs.train.resume import extends, permitted_changes, warn_of_finished_run

    changes = permitted_changes(run.recipe, recipe) if run.recipe.is_file() else []
    if not run.is_finished or extends(changes, recipe):
        return recipe
    warn_of_finished_run(run, recipe, changes)
    return None

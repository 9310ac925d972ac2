"""Loads a recipe from a YAML file and overrides, or reports all its problems; and writes it back as YAML."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError

from finetune.errors import FinetuneError, Problem, RecipeError
from finetune.recipe import secrets
from finetune.recipe.error_messages import explain
from finetune.recipe.overrides import apply_overrides
from finetune.recipe.recipe import Recipe
from finetune.recipe.renamed_keys import rename_keys, rename_tasks
from finetune.recipe.rules import RULES, Violation, broken_tasks
from finetune.recipe.schema import json_schema as json_schema  # exported here beside load and dump
from finetune.recipe.schema import shape_at
from finetune.recipe.sections.evaluation import TaskFile, TaskSection
from finetune.recipe.task_file import nest_tasks
from finetune.recipe.yaml.document import MAX_BYTES, KeyPath, decode, position_at, read_yaml
from finetune.recipe.yaml.origins import Origin, Placed, SourceMap
from finetune.recipe.yaml.writer import block

logger = logging.getLogger(__name__)

RESOLVED_RECIPE = "recipe.resolved.yaml"
"""Name of the recipe that a run or a checkpoint records."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe and its source.

    Attributes:
        recipe: The recipe with all defaults filled in, absolute paths and a name.
        text: The file as written.
        path: The file.
        overrides: The `--set` arguments.
        sources: The origins of its parts.
    """

    recipe: Recipe
    text: str
    path: Path
    overrides: tuple[str, ...] = ()
    sources: SourceMap | None = field(default=None, repr=False, compare=False)

    def refuse(self, violations: Sequence[Violation]) -> None:
        """Refuse a recipe with violations that its own rules do not find.

        Raises:
            RecipeError: There are any.
        """
        if violations and self.sources is not None:
            _refuse(_placed(violation, self.sources) for violation in violations)

    @contextmanager
    def locating_errors(self) -> Iterator[None]:
        """A context in which errors about a key of the recipe get its file and line as their place.

        Raises:
            FinetuneError: As raised in the block.
        """
        try:
            yield
        except RecipeError as error:
            raise RecipeError([self._located(problem) for problem in error.problems]) from error
        except FinetuneError as error:
            if error.where is not None and self._origin(error.where) is not None:
                error.where = f"{self._origin(error.where)}: {error.where}"
            raise

    def _located(self, problem: Problem) -> Problem:
        """A problem whose place is a key, with the place of the key instead."""
        origin = self._origin(problem.key) if problem.where == problem.key else None
        return problem if origin is None else replace(problem, where=origin)

    def _origin(self, key: str) -> str | None:
        """The place of a key in words, or of the key of the section around it; None if the schema has no such key."""
        path = _path_of(key)
        if self.sources is None or shape_at(path, self.recipe.model_dump(mode="json")) is None:
            return None
        return self.sources.value_origin(path).text


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read and validate a recipe.

    Args:
        path: A YAML file. Relative paths in it, and in `overrides`, start at its folder.
        overrides: `a.b=value` each; the value is YAML, and the last one for a key wins.

    Raises:
        RecipeError: All problems of the file and of the overrides.
    """
    return recipe_of(decode(_read(path), str(path)), path, overrides)


def recipe_of(text: str, path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Validate the text of a recipe as if it were the content of the file `path`, which need not exist.

    Raises:
        RecipeError: All problems of the text and of the overrides.
    """
    _refuse_secrets(text, str(path), overrides)
    sources = SourceMap(read_yaml(text, str(path)), str(path))
    of_file = rename_keys(sources)
    if path.name == RESOLVED_RECIPE:
        rename_tasks(sources)
    of_overrides = apply_overrides(sources, overrides)
    # A user cannot edit the recipe that a run recorded, so its old spellings are read in silence.
    for note in (*(() if path.name == RESOLVED_RECIPE else of_file.notes), *of_overrides.notes):
        _warn_once(note)
    problems = [*of_file.problems, *of_overrides.problems]
    try:
        context = {"folder": path.parent.resolve()}
        recipe = Recipe.model_validate(sources.data, context=context)
    except ValidationError as error:
        _refuse([*problems, *explain(error, sources)])
    problems += _broken_rules(recipe, sources)
    if problems:
        _refuse(problems)
    return LoadedRecipe(_named(recipe, path), text, path, tuple(overrides), sources)


def load_tasks(path: Path) -> list[TaskSection]:
    """Read and validate a file of tasks: `evaluation: {tasks: [...]}` as in a recipe, `tasks: [...]`, or a list.

    Args:
        path: A YAML file. Relative paths in it start at its folder.

    Raises:
        RecipeError: All problems of the file.
    """
    text = decode(_read(path), str(path))
    _refuse_secrets(text, str(path), ())
    sources = SourceMap(read_yaml(text, str(path)), str(path))
    if problem := nest_tasks(sources):
        _refuse([problem])
    try:
        found = TaskFile.model_validate(sources.data, context={"folder": path.parent.resolve()})
    except ValidationError as error:
        _refuse(explain(error, sources))
    tasks: list[TaskSection] = list(found.evaluation.tasks)
    if violation := broken_tasks(tasks):
        _refuse([_placed(violation, sources)])
    return tasks


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; loading it gives an equal recipe."""
    return block(recipe.model_dump(mode="json"))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        what, hint = "there is no such file", _recipes_like(path)
    except IsADirectoryError:
        what, hint = "this is a folder, not a recipe", _recipes_in(path)
    except OSError as error:
        what, hint = f"the file cannot be read: {error.strerror}", None
    raise RecipeError([Problem(str(path), "", what, hint)])


def _recipes_like(path: Path) -> str:
    """A hint for a missing file: the recipe with a similar name, or else all recipes of its folder."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    near = difflib.get_close_matches(path.name, _recipe_names(path.parent), n=1, cutoff=0.5)
    return f"did you mean {path.parent / near[0]}?" if near else _recipes_in(path.parent)


def _recipes_in(folder: Path) -> str:
    names = _recipe_names(folder)
    return f"recipes in that folder: {', '.join(names[:8])}" if names else f"there is no .yaml file in {folder}"


def _recipe_names(folder: Path) -> list[str]:
    return sorted(
        entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml") and not entry.name.startswith(".")
    )


def _refuse_secrets(text: str, file: str, overrides: Sequence[str]) -> None:
    """Refuse secrets in keys, values and comments, before any message can quote them."""
    origins = [Origin.in_file(file, position_at(text, offset)) for offset in secrets.find_secrets(text)]
    for number, argument in enumerate(overrides, 1):
        if secrets.has_secret(argument):
            key = argument.partition("=")[0]
            origins.append(Origin.in_override(number, "..." if secrets.has_secret(key) else key))
    if origins:
        _refuse((origin, Problem(origin.text, "", secrets.WHAT, secrets.HINT)) for origin in origins)


@cache
def _warn_once(note: str) -> None:
    """Log a warning once in a process: a sweep loads its recipe for each trial."""
    logger.warning("%s", note)


def _broken_rules(recipe: Recipe, sources: SourceMap) -> list[Placed]:
    return [_placed(violation, sources) for rule in RULES if (violation := rule(recipe))]


def _placed(violation: Violation, sources: SourceMap) -> Placed:
    origin = sources.value_origin(_path_of(violation.key))
    return origin, Problem(origin.text, violation.key, violation.what, violation.hint)


def _path_of(key: str) -> KeyPath:
    """A dotted key as a path."""
    return tuple(int(segment) if segment.isdigit() else segment for segment in key.split("."))


def _refuse(placed: Iterable[Placed]) -> NoReturn:
    in_order = sorted(placed, key=itemgetter(0))
    raise RecipeError(list(dict.fromkeys(problem for _, problem in in_order))) from None


def _named(recipe: Recipe, path: Path) -> Recipe:
    """The recipe with a run name: its own, or else the name of the file."""
    if recipe.run.name is not None:
        return recipe
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("._-")[:64] or "run"
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"name": name})})

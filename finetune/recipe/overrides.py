"""`--set key=value`: arguments that change or complete a recipe from the command line."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from finetune.errors import Problem, RecipeError
from finetune.recipe.renamed_keys import Renaming, rename_keys
from finetune.recipe.schema import shape_at
from finetune.recipe.yaml.document import MAX_DEPTH, KeyPath, dotted, read_yaml
from finetune.recipe.yaml.origins import Origin, Placed, SourceMap

_INDEX = re.compile("[0-9]{1,5}")


class _OverrideError(Exception):
    """An argument that cannot be applied, with the problem and the fix."""

    def __init__(self, what: str, hint: str | None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


def apply_overrides(sources: SourceMap, arguments: Sequence[str]) -> Renaming:
    """Write each `a.b=value` into the recipe, in their order.

    Validation reports keys that the schema does not have, for the file and the arguments alike.

    Args:
        sources: The recipe, which is changed.
        arguments: As given; the value is YAML, numbers in the key are list indices.

    Returns:
        The problems of arguments that could not be applied, and notes on keys with an earlier spelling.
    """
    notes: list[str] = []
    problems: list[Placed] = []
    for number, argument in enumerate(arguments, 1):
        key, equals, text = argument.partition("=")
        key = key.strip()
        origin = Origin.in_override(number, key)
        try:
            _check_form(key, equals)
            _put(sources, key.split("."), _read_value(key, text), origin)
        except _OverrideError as error:
            problems.append((origin, Problem(origin.text, key, error.what, error.hint)))
        else:
            # After each argument, so that a later one replaces an earlier one in either spelling.
            renaming = rename_keys(sources)
            notes += renaming.notes
            problems += renaming.problems
    return Renaming(tuple(notes), tuple(problems))


def _check_form(key: str, equals: str) -> None:
    if not equals:
        raise _OverrideError("expected key=value", "for instance: --set optimizer.learning_rate=1e-4")
    if key.count(".") >= MAX_DEPTH:
        raise _OverrideError(f"the key has more than {MAX_DEPTH} parts", "ft explain lists the keys of a section")
    if not all(key.split(".")):
        raise _OverrideError("expected a dotted key before the `=`", "for instance: adapter.r=8")


def _read_value(key: str, text: str) -> Any:
    try:
        value = read_yaml(text, key).data
    except RecipeError as error:
        problem = error.problems[0]
        raise _OverrideError(problem.what, _quoting_hint(key, text, problem.hint)) from error
    if value is None and text.lstrip().startswith("#"):
        raise _OverrideError("a value that begins with `#` is a comment", _quoting_hint(key, text, None))
    return value


def _quoting_hint(key: str, text: str, otherwise: str | None) -> str | None:
    """A hint on quoting the value as text, unless it looks like a list or mapping."""
    if text.lstrip().startswith(("[", "{")):
        return otherwise
    quoted = json.dumps(text, ensure_ascii=False) if len(text) <= 60 else '"..."'
    return f"if it is meant as text: --set {shlex.quote(f'{key}={quoted}')}"


def _put(sources: SourceMap, segments: Sequence[str], value: Any, origin: Origin) -> None:
    """Set the value at the path `segments`; mappings and lists on the way that are absent or null are created."""
    container = sources.data
    path: KeyPath = ()
    if not isinstance(container, dict):
        return  # the recipe is not a mapping: validation reports it
    for segment, following in pairwise(segments):
        path = (*path, _slot(container, path, segment))
        if sources.value(path) is None:
            _store(container, path[-1], _new_container(path, following, sources.data))
            sources.record(path, origin)
        container = sources.value(path)
    path = (*path, _slot(container, path, segments[-1]))
    _store(container, path[-1], value)
    sources.record(path, origin)


def _slot(container: Any, path: KeyPath, segment: str) -> str | int:
    """`segment` as a key or list index; one past the end of a list adds an item."""
    if isinstance(container, dict):
        return segment
    if not isinstance(container, list):
        raise _OverrideError(f"{dotted(path)} is a single value and has no key {segment!r}", None)
    index = int(segment) if _INDEX.fullmatch(segment) else -1
    if not 0 <= index <= len(container):
        what = f"{dotted(path)} is a list of {len(container)} and has no item {segment!r}"
        raise _OverrideError(what, f"use an index from 0; {len(container)} adds an item")
    return index


def _store(container: Any, slot: str | int, value: Any) -> None:
    if slot == len(container) and isinstance(container, list):
        container.append(value)
    else:
        container[slot] = value


def _new_container(path: KeyPath, following: str, data: Any) -> Any:
    """A list if an index follows, otherwise a mapping with the section's default kind."""
    if _INDEX.fullmatch(following):
        return []
    shape = shape_at(path, data)
    return {shape.tag: shape.default_tag} if shape and shape.default_tag else {}

"""Differences between two recipes, such as that of a run and the one to resume it with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.section import OnResume, Section


@dataclass(frozen=True)
class Change:
    """A key whose value differs.

    Attributes:
        key: Dotted path.
        old: Value before, in words.
        new: Value now, in words.
        on_resume: Whether the key may change when a run is resumed.
    """

    key: str
    old: str
    new: str
    on_resume: OnResume

    def __str__(self) -> str:
        """`training.epochs: 1.0 -> 2.0`."""
        return f"{self.key}: {self.old} -> {self.new}"


def changes(old: Recipe, new: Recipe) -> list[Change]:
    """Every key whose value differs, in the order of the schema."""
    return list(_between("", old, new, OnResume.FROZEN))


def on_resume(section: type[Section], key: str) -> OnResume:
    """Whether a key may change when a run is resumed: the key's annotation, or else the rule of its section."""
    annotations = section.model_fields[key].metadata
    return next((each for each in annotations if isinstance(each, OnResume)), section.on_resume)


def _between(key: str, old: Any, new: Any, rule: OnResume) -> Iterator[Change]:
    if old == new:
        return
    if isinstance(old, Section) and isinstance(new, Section):
        # Sections of different kinds differ in their tag first; only the keys of both can be compared.
        for name in [name for name in type(old).model_fields if name in type(new).model_fields]:
            child = f"{key}.{name}" if key else name
            yield from _between(child, getattr(old, name), getattr(new, name), on_resume(type(old), name))
    elif isinstance(old, list) and isinstance(new, list) and all(isinstance(item, Section) for item in (*old, *new)):
        for index, (before, after) in enumerate(zip_longest(old, new)):
            yield from _between(f"{key}.{index}", before, after, rule)
    else:
        yield Change(key, _in_words(old), _in_words(new), rule)


def _in_words(value: Any) -> str:
    if isinstance(value, Section):
        value = value.model_dump(mode="json", exclude_defaults=True)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:79]}…"

"""What differs between the recipe that a run was started with and the one that it is to go on with."""

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
        on_resume: Whether it may.
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
    """What may become of a key when a run is resumed: its own word, or its section's."""
    return next((word for word in section.model_fields[key].metadata if isinstance(word, OnResume)), section.on_resume)


def _between(key: str, old: Any, new: Any, word: OnResume) -> Iterator[Change]:
    if old == new:
        return
    if isinstance(old, Section) and isinstance(new, Section):
        # Sections of different kinds differ in their tag first, and what else they have cannot be compared.
        for name in [name for name in type(old).model_fields if name in type(new).model_fields]:
            child = f"{key}.{name}" if key else name
            yield from _between(child, getattr(old, name), getattr(new, name), on_resume(type(old), name))
    elif isinstance(old, list) and isinstance(new, list) and all(isinstance(item, Section) for item in (*old, *new)):
        for index, (before, after) in enumerate(zip_longest(old, new)):
            yield from _between(f"{key}.{index}", before, after, word)
    else:
        yield Change(key, _in_words(old), _in_words(new), word)


def _in_words(value: Any) -> str:
    if isinstance(value, Section):
        value = value.model_dump(mode="json", exclude_defaults=True)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:79]}…"

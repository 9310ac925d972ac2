"""Records of ft in JSON files, which other versions, other people or failing disks may have written.

Each kind of record has a shape, a TypedDict without required keys, and one function that reads it. Readers get what has
its shape: a part of another type is left out, as if it had not been written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from finetune.storage.files import json_object

Shape = TypeVar("Shape")

Integer = Annotated[int, Field(strict=True, ge=-(1 << 63), lt=1 << 63)]
Count = Annotated[Integer, Field(ge=0)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]

with_other_keys = with_config(ConfigDict(extra="allow"))
"""Decorator of shapes: keys that a shape does not name are kept."""


def read_record(file: Path, shape: type[Shape]) -> Shape:
    """The JSON object of a file, without the parts that do not have their shape; empty if it is missing or damaged."""
    return well_formed(json_object(file), shape)


def well_formed(value: Mapping[str, Any], shape: type[Shape]) -> Shape:
    """A record without the parts that do not have their shape; an object that lacks a required key is such a part.

    Args:
        value: The record.
        shape: A TypedDict without required keys.
    """
    found: Any = value
    while True:
        try:
            return cast(Shape, adapter(shape).validate_python(found))
        except ValidationError as error:
            faults = {_existing(found, fault["loc"]) for fault in error.errors(include_url=False)}
            found = {} if () in faults else _without(found, faults)


def adapter(shape: Any) -> TypeAdapter[Any]:
    """The validator of a type, built once."""
    return _adapter(shape)


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def _existing(value: Any, path: Sequence[str | int]) -> tuple[str | int, ...]:
    """The part of a path that exists in a value: that of a missing key is the object that lacks it."""
    existing: list[str | int] = []
    for key in path:
        is_there = key in value if isinstance(value, dict) else isinstance(value, list) and isinstance(key, int)
        if not is_there:
            break
        value = value[key]
        existing.append(key)
    return tuple(existing)


def _without(value: Any, faults: Iterable[Sequence[str | int]]) -> Any:
    """A value without the parts at these paths."""
    of_key: dict[str | int, list[Sequence[str | int]]] = {}
    for first, *rest in faults:
        of_key.setdefault(first, []).append(rest)
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    kept = {
        key: _without(each, of_key[key]) if key in of_key else each
        for key, each in entries
        if [] not in of_key.get(key, ())
    }
    return kept if isinstance(value, dict) else list(kept.values())

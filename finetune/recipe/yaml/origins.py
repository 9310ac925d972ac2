"""A recipe as written: its data, and for every part the place that it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.errors import Problem
from finetune.recipe.yaml.document import Document, KeyPath, Position


@dataclass(frozen=True, order=True)
class Origin:
    """Where a part of a recipe was written; origins sort as a user reads them, the file first.

    Attributes:
        override: 0 for the file, otherwise the number of the `--set` argument.
        position: Line and column in the file.
        text: The place in words: `file:line:column` or `--set key`.
    """

    override: int
    position: Position
    text: str

    @classmethod
    def in_file(cls, file: str, position: Position) -> Origin:
        """A place in the recipe file."""
        return cls(0, position, f"{file}:{position.line}:{position.column}")

    @classmethod
    def in_override(cls, number: int, key: str) -> Origin:
        """The `number`-th `--set` argument, counting from 1."""
        return cls(number, Position(0, 0), f"--set {key}")


Placed = tuple[Origin, Problem]
"""A problem and the place by which it is sorted among the others."""


class SourceMap:
    """The data of a recipe, its overrides included, with the origin of every part.

    Args:
        document: The recipe file's content.
        file: The recipe file's name as the user gave it.
    """

    def __init__(self, document: Document, file: str) -> None:
        self.data: Any = {} if document.data is None else document.data
        self._keys = {path: Origin.in_file(file, place.key) for path, place in document.places.items()}
        self._values = {path: Origin.in_file(file, place.value) for path, place in document.places.items()}

    def value(self, path: KeyPath) -> Any:
        """The data at `path`, or None where nothing is written."""
        found = self.data
        for segment in path:
            if isinstance(found, dict):
                found = found.get(str(segment))
            elif isinstance(found, list) and isinstance(segment, int) and segment < len(found):
                found = found[segment]
            else:
                return None
        return found

    def key_origin(self, path: KeyPath) -> Origin:
        """Where the key of `path` is written, or else the nearest key around it."""
        return self._keys[self._nearest(path)]

    def value_origin(self, path: KeyPath) -> Origin:
        """Where the value of `path` is written, or else the key of the nearest mapping around it."""
        nearest = self._nearest(path)
        return self._values[path] if nearest == path else self._keys[nearest]

    def is_overridden(self, path: KeyPath) -> bool:
        """Whether the value at `path` comes from a `--set` argument."""
        return self.value_origin(path).override > 0

    def record(self, path: KeyPath, origin: Origin) -> None:
        """Note that all of `path` was written anew at `origin`."""
        for origins in (self._keys, self._values):
            for old in [old for old in origins if old[: len(path)] == path]:
                del origins[old]
            origins[path] = origin

    def rename(self, path: KeyPath, name: str) -> None:
        """Give the key at `path`, which is written, another name in its section; its origins stay those of the old."""
        renamed = (*path[:-1], name)
        value = self.value(path)
        moved = {
            (*renamed, *place[len(path) :]): (self._keys[place], self._values[place])
            for place in self._keys
            if place[: len(path)] == path
        }
        self.remove(path)
        self.remove(renamed)
        self.value(path[:-1])[name] = value
        for place, (key_origin, value_origin) in moved.items():
            self._keys[place], self._values[place] = key_origin, value_origin

    def remove(self, path: KeyPath) -> None:
        """Remove a key of a mapping, if it is written, and its origins."""
        self.value(path[:-1]).pop(path[-1], None)
        for origins in (self._keys, self._values):
            for old in [old for old in origins if old[: len(path)] == path]:
                del origins[old]

    def _nearest(self, path: KeyPath) -> KeyPath:
        while path not in self._keys:
            path = path[:-1]
        return path

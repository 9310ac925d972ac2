"""The data of a recipe as written, and the source of every part: the file or a `--set` argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.errors import Problem
from finetune.recipe.yaml.document import Document, KeyPath, Position


@dataclass(frozen=True, order=True)
class Origin:
    """The place at which a part of a recipe is written. Origins sort in reading order, the file first.

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
"""A problem and the place by which problems are sorted."""


class SourceMap:
    """The data of a recipe, including overrides, with the origin of every part.

    Args:
        document: The recipe file's content.
        file: The recipe file's name as the user gave it.
    """

    def __init__(self, document: Document, file: str) -> None:
        self.data: Any = {} if document.data is None else document.data
        self._keys = {path: Origin.in_file(file, place.key) for path, place in document.places.items()}
        self._values = {path: Origin.in_file(file, place.value) for path, place in document.places.items()}

    def value(self, path: KeyPath) -> Any:
        """The data at `path`, or None if nothing is written there."""
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
        """The origin of the key of `path`, or else of the nearest key around it."""
        return self._keys[self._nearest(path)]

    def value_origin(self, path: KeyPath) -> Origin:
        """The origin of the value of `path`, or else of the key of the nearest mapping around it."""
        nearest = self._nearest(path)
        return self._values[path] if nearest == path else self._keys[nearest]

    def is_overridden(self, path: KeyPath) -> bool:
        """Whether the value at `path` comes from a `--set` argument."""
        return self.value_origin(path).override > 0

    def record(self, path: KeyPath, origin: Origin) -> None:
        """Set the origin of `path` and everything below it."""
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

    def nest(self, path: KeyPath) -> None:
        """Put all data below `path`, a path of keys; its new sections have the origin of the whole."""
        whole: KeyPath = ()
        for origins in (self._keys, self._values):
            moved = {(*path, *place): origin for place, origin in origins.items()}
            around = {path[:depth]: origins[whole] for depth in range(len(path))}
            origins.clear()
            origins.update({**around, **moved})
        for key in reversed(path):
            self.data = {key: self.data}

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

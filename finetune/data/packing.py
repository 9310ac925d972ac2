"""Short examples put together into packs by best fit."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WINDOW = 8192
"""Rows that are packed together: enough that packs are full, few enough that neighbours differ from seed to seed."""


@dataclass(frozen=True)
class Packs:
    """Which rows stand in which pack; every row stands in one.

    Attributes:
        rows: Numbers of the rows, pack after pack.
        ends: Of each pack, counted in `rows`.
        capacity: Tokens that a pack can hold.
        tokens: Tokens of all rows.
    """

    rows: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    capacity: int
    tokens: int

    def __len__(self) -> int:
        """Number of packs."""
        return len(self.ends)

    def __getitem__(self, index: int) -> list[int]:
        """The rows of a pack."""
        rows: list[int] = self.rows[self.ends[index - 1] if index else 0 : self.ends[index]].tolist()
        return rows

    @property
    def fill(self) -> float:
        """Share of the packs' room that is used."""
        return self.tokens / (len(self) * self.capacity)


def packed(lengths: npt.NDArray[np.int64], capacity: int, seed: int, window: int = WINDOW) -> Packs:
    """Pack rows of the given lengths: drawn in random order, a window at a time, by best fit.

    Args:
        lengths: Tokens of each row.
        capacity: Tokens of a pack.
        seed: Of the order.
        window: Rows that are packed together.

    Raises:
        ValueError: A row is longer than a pack.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"a row of {lengths.max()} tokens does not fit into a pack of {capacity}")
    order = np.random.default_rng(seed).permutation(len(lengths))
    packs = [
        [order[first + place] for place in pack]
        for first in range(0, len(order), window)
        for pack in best_fit(lengths[order[first : first + window]].tolist(), capacity)
    ]
    rows = np.array([row for pack in packs for row in pack], np.int64)
    return Packs(rows, np.cumsum([len(pack) for pack in packs], dtype=np.int64), capacity, int(lengths.sum()))


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Places of the lengths, grouped: the longest first, each into the fullest group with room (best-fit decreasing).

    Source: Johnson, "Near-optimal bin packing algorithms", 1973: never more than 11/9 of the fewest packs, and 4.
    """
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # free tokens and number of each group that is not full, ascending
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        length = lengths[place]
        at = bisect_left(room, (length, 0))
        if at < len(room):
            free, group = room.pop(at)
            groups[group].append(place)
        else:
            free, group = capacity, len(groups)
            groups.append([place])
        if free > length:
            insort(room, (free - length, group))
    return groups

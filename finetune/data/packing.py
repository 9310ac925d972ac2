"""Packing: rows are combined into packs of bounded length by best-fit decreasing."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WINDOW = 8192
"""Number of rows that are packed at a time.

Large enough for packs that are nearly full. Packing all rows at once would combine the same lengths whatever the seed.
"""


@dataclass(frozen=True)
class Packs:
    """The rows of each pack; every row is in exactly one.

    Attributes:
        rows: Indices of the rows, pack after pack, shape (rows,).
        ends: End of each pack in `rows`, shape (packs,).
        capacity: Maximum number of tokens of a pack.
        tokens: Number of tokens of all rows.
    """

    rows: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    capacity: int
    tokens: int

    def __len__(self) -> int:
        """Number of packs."""
        return len(self.ends)

    def __getitem__(self, index: int) -> list[int]:
        """Indices of the rows of a pack."""
        rows: list[int] = self.rows[self.ends[index - 1] if index else 0 : self.ends[index]].tolist()
        return rows

    @property
    def fill(self) -> float:
        """Fraction of the packs' capacity that is used."""
        return self.tokens / (len(self) * self.capacity)


def packed(
    lengths: npt.NDArray[np.int64],
    capacity: int,
    seed: int,
    window: int = WINDOW,
    groups: npt.NDArray[np.int64] | None = None,
) -> Packs:
    """Pack rows of the given lengths by best fit: in random order, a window at a time.

    Args:
        lengths: Number of tokens of each row, shape (rows,), int64.
        capacity: Maximum number of tokens of a pack.
        seed: Seed of the random order.
        window: Number of rows that are packed at a time.
        groups: A number for each row, shape (rows,), int64; packs have rows of one number. None for no bounds.

    Raises:
        ValueError: A row is longer than a pack.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"a row of {lengths.max()} tokens does not fit into a pack of {capacity}")
    order = np.random.default_rng(seed).permutation(len(lengths))
    groups = np.zeros_like(lengths) if groups is None else groups
    packs = [
        [rows[index] for index in pack]
        for first in range(0, len(order), window)
        for rows in _by_group(order[first : first + window], groups)
        for pack in best_fit(lengths[rows].tolist(), capacity)
    ]
    rows = np.array([row for pack in packs for row in pack], np.int64)
    return Packs(rows, np.cumsum([len(pack) for pack in packs], dtype=np.int64), capacity, int(lengths.sum()))


def _by_group(rows: npt.NDArray[np.int64], groups: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Row indices, those of each group in their order."""
    return [rows[groups[rows] == group] for group in np.unique(groups[rows])]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the lengths, grouped by best-fit decreasing: the longest first, each into the fullest group with room.

    Source: Johnson, "Near-optimal bin packing algorithms", 1973: at most 11/9 of the optimal number of groups plus 4.
    """
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, index) of each group that is not full, ascending
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        at = bisect_left(room, (length, 0))  # the fullest group with room: O(log n) instead of a scan of all groups
        if at < len(room):
            free, group = room.pop(at)
            groups[group].append(index)
        else:
            free, group = capacity, len(groups)
            groups.append([index])
        if free > length:
            insort(room, (free - length, group))
    return groups

"""How the rows of several sources become one set: seeded draws without repetition."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def draw(items: Iterable[T], count: int, seed: int) -> list[T]:
    """`count` of the items, or all if there are fewer, each set of them as likely; in their order.

    Holds no more than `count` items in memory: reservoir sampling (Vitter 1985, algorithm R).
    """
    generator = random.Random(seed)
    drawn: list[tuple[int, T]] = []
    for index, item in enumerate(items):
        if index < count:
            drawn.append((index, item))
        elif (slot := generator.randrange(index + 1)) < count:
            drawn[slot] = (index, item)
    return [item for _, item in sorted(drawn, key=lambda pair: pair[0])]


def shares(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many rows to take of each source, so that their numbers stand as the weights do and no row comes twice.

    The source that runs out first relative to its weight is used up; it bounds the others. A source that has
    rows gives at least one.

    Args:
        sizes: Rows of each source.
        weights: The weight of each, above 0.
    """
    rows_per_weight = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    counts = [round(rows_per_weight * weight) for weight in weights]
    return [min(size, max(1, count)) for size, count in zip(sizes, counts, strict=True)]

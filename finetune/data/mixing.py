"""How the rows of several sources become one set: seeded draws without repetition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def drawn(size: int, count: int, seed: int) -> npt.NDArray[np.int64]:
    """The numbers of `count` rows of `size`, or of all if there are fewer: each set as likely, in ascending order."""
    if count >= size:
        return np.arange(size)
    return np.sort(np.random.default_rng(seed).permutation(size)[:count])


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

"""Samples without replacement, and the mixture of several sources by weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def sampled(size: int, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Indices of a uniform sample of `count` of `size` rows, ascending, int64; all rows if there are fewer."""
    if count >= size:
        return np.arange(size)
    # The beginning of a permutation: with the same seed, a smaller sample is a subset of a larger one.
    return np.sort(np.random.default_rng(seed).permutation(size)[:count])


def rows_by_weight(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Number of rows to take of each source: proportional to the weights, and no row twice.

    The source that is smallest relative to its weight is used completely and limits the others. Every source with
    rows contributes at least one.

    Args:
        sizes: Number of rows of each source.
        weights: Weight of each source, above 0.
    """
    rows_per_weight = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    counts = [round(rows_per_weight * weight) for weight in weights]
    return [min(size, max(1, count)) for size, count in zip(sizes, counts, strict=True)]

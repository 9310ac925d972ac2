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


def sampled_prompts(
    prompts: npt.NDArray[np.uint64], sources: npt.NDArray[np.int64], fraction: float, seed: int
) -> npt.NDArray[np.int64]:
    """Indices of the rows of a random sample of prompts, ascending, int64: of each prompt all rows or none.

    Prompts are taken in random order where the rows taken of each source stay within `fraction` of its rows. If no
    prompt fits, the one with the fewest rows is taken, unless it has more than half of all rows.

    Args:
        prompts: Hash of the prompt of each row, shape (rows,); 0 for a row without a prompt, which is one by itself.
        sources: Source of each row, shape (rows,), from 0.
        fraction: Fraction of the rows, in (0, 1).
        seed: Seed of the sample.
    """
    group_of_row = np.unique(prompts, return_inverse=True)[1]
    without = np.flatnonzero(prompts == 0)
    group_of_row[without] = group_of_row.max(initial=0) + 1 + np.arange(len(without))
    # The rows of each group in each of its sources: pairs (group, source), ascending, with their number of rows.
    pairs, rows = np.unique(np.stack([group_of_row, sources]), axis=1, return_counts=True)
    groups, begins = np.unique(pairs[0], return_index=True)
    ends = np.append(begins[1:], len(rows))
    sizes = np.add.reduceat(rows, begins)
    room = np.round(fraction * np.bincount(sources)).astype(np.int64)
    generator = np.random.default_rng(seed)
    taken = []
    for group in generator.permutation(len(groups)):
        part = slice(begins[group], ends[group])
        if (rows[part] <= room[pairs[1, part]]).all():
            room[pairs[1, part]] -= rows[part]
            taken.append(group)
    if not taken and sizes.min() <= len(prompts) // 2:
        taken = [generator.choice(np.flatnonzero(sizes == sizes.min()))]
    return np.flatnonzero(np.isin(group_of_row, groups[taken]))


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

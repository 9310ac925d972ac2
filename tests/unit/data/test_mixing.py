"""Samples are uniform and ordered; mixtures follow the weights and use up the scarcest source."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from finetune.data.mixing import rows_by_weight, sampled


def test_sampled_sets_are_uniform():
    counts = Counter(tuple(sampled(5, 2, seed).tolist()) for seed in range(5000))
    assert set(counts) == set(itertools.combinations(range(5), 2))
    assert all(400 < count < 600 for count in counts.values())


@pytest.mark.parametrize("count", [3, 4, 100])
def test_sampled_count_of_size_or_more_returns_all_in_order(count: int):
    assert sampled(3, count, seed=1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ([100, 100], [1, 1], [100, 100]),
        ([100, 30], [1, 1], [30, 30]),
        ([60, 40], [3, 1], [60, 20]),
        ([60, 40], [0.75, 0.25], [60, 20]),
        ([7], [0.3], [7]),
        ([1000, 10], [1, 1000], [1, 10]),
        ([5, 0], [1, 1], [1, 0]),
    ],
)
def test_rows_by_weight_are_proportional(sizes: list[int], weights: list[float], expected: list[int]):
    assert rows_by_weight(sizes, weights) == expected


def test_rows_by_weight_use_up_scarcest_source():
    source = random.Random(3)
    for _ in range(500):
        sizes = [source.randint(1, 10_000) for _ in range(source.randint(1, 5))]
        weights = [source.uniform(0.01, 9) for _ in sizes]
        counts = rows_by_weight(sizes, weights)
        assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))
        scarcest = min(range(len(sizes)), key=lambda index: sizes[index] / weights[index])
        assert counts[scarcest] == sizes[scarcest]

"""Samples are uniform and ordered; mixtures follow the weights and use up the scarcest source."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest

from finetune.data.mixing import rows_by_weight, sampled, sampled_prompts


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


def prompts_and_sources(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """300 rows of three sources: prompts of one to eight rows, some in two sources, some rows without a prompt."""
    generator = np.random.default_rng(seed)
    prompts = generator.integers(0, 80, 300).astype(np.uint64)
    return prompts, np.sort(generator.choice(3, 300, p=[0.6, 0.3, 0.1]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_sampled_prompts_have_all_their_rows_in_proportion_of_each_source(seed: int, fraction: float):
    prompts, sources = prompts_and_sources(seed)
    taken = set(sampled_prompts(prompts, sources, fraction, seed).tolist())
    for prompt in set(prompts.tolist()) - {0}:
        rows = set(np.flatnonzero(prompts == prompt).tolist())
        assert rows <= taken or not rows & taken
    assert 0 < len(taken) <= fraction * 300 + 3
    for source in range(3):
        rows = set(np.flatnonzero(sources == source).tolist())
        assert len(taken & rows) / len(rows) == pytest.approx(fraction, abs=0.1)


def test_sampled_prompts_depend_on_the_seed_and_are_uniform():
    prompts, sources = np.arange(1, 41, dtype=np.uint64), np.zeros(40, np.int64)
    counts = Counter(row for seed in range(2000) for row in sampled_prompts(prompts, sources, 0.25, seed).tolist())
    assert all(420 < counts[row] < 580 for row in range(40))


@pytest.mark.parametrize(
    ("prompts", "fraction", "possible"),
    [
        ([5] * 10, 0.2, [[]]),  # one prompt alone cannot be on both sides
        ([5] * 9 + [7], 0.05, [[9]]),  # the smallest prompt where none fits
        ([5] * 6 + [7] * 4, 0.05, [[6, 7, 8, 9]]),
        ([0] * 4, 0.25, [[0], [1], [2], [3]]),  # rows without a prompt are split singly
        ([3, 3, 0, 3], 0.25, [[2]]),
    ],
)
def test_sampled_prompts_of_few_prompts(prompts: list[int], fraction: float, possible: list[list[int]]):
    for seed in range(4):
        rows, sources = np.array(prompts, np.uint64), np.zeros(len(prompts), np.int64)
        assert sampled_prompts(rows, sources, fraction, seed).tolist() in possible

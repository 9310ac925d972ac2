"""Packs hold every row once within their capacity, and are nearly full where rows are short."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from finetune.data.packing import best_fit, packed


def chat_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Lengths as chat data has them: most short, a few long."""
    return np.clip(np.random.default_rng(seed).lognormal(4.5, 0.8, count).astype(np.int64), 8, 400)


@pytest.mark.parametrize("window", [1, 7, 64, 1000])
def test_packs_hold_every_row_once_within_capacity(window: int):
    lengths = np.random.default_rng(window).integers(2, 101, 200)
    packs = packed(lengths, capacity=100, seed=1, window=window)
    assert sorted(row for pack in range(len(packs)) for row in packs[pack]) == list(range(200))
    assert all(lengths[packs[pack]].sum() <= 100 for pack in range(len(packs)))
    assert packs.fill == pytest.approx(lengths.sum() / (100 * len(packs)))


@pytest.mark.parametrize("window", [16, 1000])
def test_packs_hold_rows_of_one_group(window: int):
    lengths = np.random.default_rng(5).integers(2, 101, 200)
    groups = (lengths > 50).astype(np.int64)
    packs = packed(lengths, capacity=300, seed=1, window=window, groups=groups)
    assert sorted(row for pack in range(len(packs)) for row in packs[pack]) == list(range(200))
    assert all(len(set(groups[packs[pack]])) == 1 for pack in range(len(packs)))
    mixed = packed(lengths, capacity=300, seed=1, window=window)
    assert any(len(set(groups[mixed[pack]])) == 2 for pack in range(len(mixed)))


def test_best_fit_takes_fullest_group_with_room():
    groups = best_fit([60, 70, 30, 40], capacity=100)
    assert sorted(sorted(group) for group in groups) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("seed", range(30))
def test_best_fit_stays_within_bound_of_best_fit_decreasing(seed: int):
    lengths = np.random.default_rng(seed).integers(1, 11, 7).tolist()
    fewest = next(
        count
        for count in itertools.count(1)
        if any(max(np.bincount(places, lengths, count)) <= 10 for places in itertools.product(range(count), repeat=7))
    )
    assert len(best_fit(lengths, 10)) <= 11 / 9 * fewest + 4
    assert len(best_fit(lengths, 10)) <= fewest + 1


def test_packs_of_chat_rows_are_over_95_percent_full():
    assert packed(chat_lengths(1000), capacity=1024, seed=1).fill > 0.95
    assert packed(chat_lengths(20_000), capacity=1024, seed=1).fill > 0.99


def test_packing_row_longer_than_pack_raises():
    with pytest.raises(ValueError, match="does not fit"):
        packed(np.array([11]), capacity=10, seed=1)


def test_packing_depends_on_seed():
    lengths = chat_lengths(500)
    one, same, other = (packed(lengths, 1024, seed, window=100) for seed in (1, 1, 2))
    assert one.rows.tolist() == same.rows.tolist() != other.rows.tolist()


def test_packing_without_rows_makes_no_packs():
    assert len(packed(np.empty(0, np.int64), capacity=10, seed=1)) == 0

"""Layouts lose no row, cross no boundary, and change no step."""

from __future__ import annotations

import random

import pytest

from finetune.data.encode import Example
from finetune.data.layout import Layout, grouped_by_length, packed, share_of
from finetune.recipe.training import Training


def example(length: int) -> Example:
    return Example(list(range(1, length + 1)), [i % 2 == 1 for i in range(length)])


def lengths(groups: list[list[Example]]) -> list[int]:
    return sorted(len(e.ids) for group in groups for e in group)


@pytest.mark.parametrize("seed", range(5))
def test_packs_hold_every_example_once_within_their_capacity(seed: int):
    draw = random.Random(seed)
    wanted = [draw.randint(2, 100) for _ in range(200)]
    packs = packed([example(length) for length in wanted], capacity=100)
    assert lengths(packs) == sorted(wanted)
    assert all(sum(len(e.ids) for e in pack) <= 100 for pack in packs)


def test_best_fit_takes_the_fullest_pack_with_room():
    packs = packed([example(length) for length in (60, 70, 30, 40)], capacity=100)
    assert sorted(sorted(len(e.ids) for e in pack) for pack in packs) == [[30, 70], [40, 60]]


def test_packs_of_many_short_rows_are_full():
    draw = random.Random(0)
    rows = [example(min(400, max(8, int(draw.lognormvariate(4.5, 0.8))))) for _ in range(1000)]
    packs = packed(rows, capacity=1024)
    assert sum(len(e.ids) for e in rows) / (1024 * len(packs)) > 0.95


def test_an_example_longer_than_a_pack_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        packed([example(11)], capacity=10)


def test_groups_by_length_hold_neighbours_in_length():
    groups = grouped_by_length([example(length) for length in (9, 2, 8, 3)], size=2)
    assert [[len(e.ids) for e in group] for group in groups] == [[2, 3], [8, 9]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_all_processes_together_run_each_group_once_and_equally_many(world_size: int):
    groups = grouped_by_length([example(length) for length in range(3, 13)], size=2)
    shares = [share_of(groups, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(len(e.ids) for share in shares for group in share for e in group if e.targets) == list(range(3, 13))


def test_a_process_without_rows_gets_one_that_trains_nothing():
    share = share_of([[example(5)]], rank=1, world_size=2)
    assert [e.targets for group in share for e in group] == [0]


@pytest.mark.parametrize("batching", ["padded", "padding_free", "packed"])
def test_every_layout_trains_the_same_tokens(batching: str):
    examples = [example(length) for length in range(3, 13)]
    layout = Layout.of(Training(batching=batching, micro_batch_size=3), max_length=16, padding=0)
    batches = layout.micro_batches(examples, rank=0, world_size=1)
    assert sum(batch.tokens for batch in batches) == sum(len(e.ids) for e in examples)
    assert sum(batch.targets for batch in batches) == sum(e.targets for e in examples)
    assert layout.restarts_positions == (batching != "padded")

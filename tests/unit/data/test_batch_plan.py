"""Layouts lose no row, cross no boundary, and share a step out evenly."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.data.batch_plan import BatchPlan, Unit, groups_of_rank
from finetune.data.encode import Example
from finetune.recipe.sections.training import Training


def example(length: int) -> Example:
    return Example(list(range(1, length + 1)), [i % 2 == 1 for i in range(length)])


def layout_of(batching: str, lengths: list[int], micro_batch_size: int = 3) -> BatchPlan:
    training = Training(batching=batching, micro_batch_size=micro_batch_size)
    return BatchPlan.of(training, np.array(lengths), max_length=16, padding=0)


def units_of(layout: BatchPlan, lengths: list[int]) -> list[Unit]:
    return [[example(lengths[row]) for row in layout.rows_of(unit)] for unit in range(layout.units)]


def test_groups_hold_neighbours_in_length():
    layout = layout_of("padded", [9, 2, 8, 3], micro_batch_size=2)
    groups = layout.groups(units_of(layout, [9, 2, 8, 3]))
    assert [[len(e.ids) for unit in group for e in unit] for group in groups] == [[2, 3], [8, 9]]


def test_groups_of_joined_rows_have_as_many_tokens():
    layout = layout_of("padding_free", [9, 2, 8, 3, 5, 1], micro_batch_size=3)
    groups = layout.groups(units_of(layout, [9, 2, 8, 3, 5, 1]))
    assert [[len(e.ids) for unit in group for e in unit] for group in groups] == [[9, 3, 2], [8, 5, 1]]


def test_no_group_of_joined_rows_has_more_rows_than_the_recipe_says():
    lengths = [500, 1, 1, 1, 1, 1, 1]
    layout = layout_of("padding_free", lengths, micro_batch_size=3)
    groups = layout.groups(units_of(layout, lengths))
    assert sorted(len(group) for group in groups) == [1, 3, 3]
    assert sorted(len(e.ids) for group in groups for unit in group for e in unit) == sorted(lengths)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_all_processes_together_run_each_group_once_and_equally_many(world_size: int):
    lengths = list(range(3, 13))
    layout = layout_of("padded", lengths, micro_batch_size=2)
    groups = layout.groups(units_of(layout, lengths))
    shares = [groups_of_rank(groups, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    run = [e for share in shares for group in share for unit in group for e in unit if e.targets]
    assert sorted(len(e.ids) for e in run) == lengths


def test_a_process_without_rows_gets_one_that_trains_nothing():
    share = groups_of_rank([[[example(5)]]], rank=1, world_size=2)
    assert [e.targets for group in share for unit in group for e in unit] == [0]


@pytest.mark.parametrize("batching", ["padded", "padding_free", "packed"])
def test_every_layout_trains_the_same_tokens(batching: str):
    lengths = list(range(3, 13))
    layout = layout_of(batching, lengths)
    batches = layout.micro_batches(units_of(layout, lengths), rank=0, world_size=1)
    assert sum(batch.tokens for batch in batches) == sum(lengths)
    assert sum(batch.targets for batch in batches) == sum(example(length).targets for length in lengths)
    assert layout.restarts_positions == (batching != "padded")


def test_a_unit_is_a_row_or_a_pack():
    lengths = [8, 8, 4, 4, 4, 4]
    assert layout_of("padding_free", lengths).units == 6
    packed = layout_of("packed", lengths)
    assert packed.units == 2
    assert sorted(row for unit in range(2) for row in packed.rows_of(unit)) == list(range(6))

"""Batch plans: plans keep every row, and groups of a step are balanced over ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from finetune.data.batch_plan import BatchPlan, Unit, groups_of_rank
from finetune.data.encode import Example
from finetune.recipe.sections.training import Training


def example(length: int) -> Example:
    return Example(list(range(1, length + 1)), [i % 2 == 1 for i in range(length)])


def plan_of(batching: str, lengths: list[int], micro_batch_size: int = 3) -> BatchPlan:
    training = Training(batching=batching, micro_batch_size=micro_batch_size)
    return BatchPlan.of(training, np.array(lengths), max_length=16, padding=0)


def units_of(plan: BatchPlan, lengths: list[int]) -> list[Unit]:
    return [[example(lengths[row]) for row in plan.rows_of(unit)] for unit in range(plan.units)]


def test_padded_groups_hold_rows_of_similar_length():
    plan = plan_of("padded", [9, 2, 8, 3], micro_batch_size=2)
    groups = plan.groups(units_of(plan, [9, 2, 8, 3]))
    assert [[len(e.ids) for unit in group for e in unit] for group in groups] == [[2, 3], [8, 9]]


def test_flattened_groups_balance_tokens():
    plan = plan_of("padding_free", [9, 2, 8, 3, 5, 1], micro_batch_size=3)
    groups = plan.groups(units_of(plan, [9, 2, 8, 3, 5, 1]))
    assert [[len(e.ids) for unit in group for e in unit] for group in groups] == [[9, 3, 2], [8, 5, 1]]


def test_flattened_groups_respect_micro_batch_size():
    lengths = [500, 1, 1, 1, 1, 1, 1]
    plan = plan_of("padding_free", lengths, micro_batch_size=3)
    groups = plan.groups(units_of(plan, lengths))
    assert sorted(len(group) for group in groups) == [1, 3, 3]
    assert sorted(len(e.ids) for group in groups for unit in group for e in unit) == sorted(lengths)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_run_each_group_once_and_equally_many(world_size: int):
    lengths = list(range(3, 13))
    plan = plan_of("padded", lengths, micro_batch_size=2)
    groups = plan.groups(units_of(plan, lengths))
    by_rank = [groups_of_rank(groups, rank, world_size) for rank in range(world_size)]
    assert len({len(run) for run in by_rank}) == 1
    run = [e for groups in by_rank for group in groups for unit in group for e in unit if e.targets]
    assert sorted(len(e.ids) for e in run) == lengths


def test_rank_without_rows_gets_example_without_targets():
    groups = groups_of_rank([[[example(5)]]], rank=1, world_size=2)
    assert [e.targets for group in groups for unit in group for e in unit] == [0]


@pytest.mark.parametrize("batching", ["padded", "padding_free", "packed"])
def test_plans_have_same_tokens_and_targets(batching: str):
    lengths = list(range(3, 13))
    plan = plan_of(batching, lengths)
    batches = plan.micro_batches(units_of(plan, lengths), rank=0, world_size=1)
    assert sum(batch.tokens for batch in batches) == sum(lengths)
    assert sum(batch.targets for batch in batches) == sum(example(length).targets for length in lengths)
    assert plan.restarts_positions == (batching != "padded")


def test_unit_is_row_or_pack():
    lengths = [8, 8, 4, 4, 4, 4]
    assert plan_of("padding_free", lengths).units == 6
    packed = plan_of("packed", lengths)
    assert packed.units == 2
    assert sorted(row for unit in range(2) for row in packed.rows_of(unit)) == list(range(6))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batching", ["padded", "padding_free", "packed"])
@pytest.mark.parametrize("group_of", [lambda n: int(n > 8), lambda n: 0 if n <= 8 else n], ids=["sides", "lengths"])
def test_micro_batches_hold_rows_of_one_group(group_of: Callable[[int], int], batching: str, world_size: int):
    lengths = [3, 12, 9, 8, 7, 9, 16, 2, 12, 5, 9]
    training = Training(batching=batching, micro_batch_size=3, pack_length=32 if batching == "packed" else None)
    plan = BatchPlan.of(training, np.array(lengths), max_length=16, padding=0, group_of=group_of)
    units = units_of(plan, lengths)
    groups = plan.groups(units, world_size)
    assert sorted(len(e.ids) for group in groups for unit in group for e in unit) == sorted(lengths)
    assert all(len({group_of(len(e.ids)) for unit in group for e in unit}) == 1 for group in groups)
    assert all(len(group) <= 3 for group in groups)
    passes = [len(plan.micro_batches(units, rank, world_size)) for rank in range(world_size)]
    assert len(set(passes)) == 1, "every rank takes part in every collective"
    assert all(len({group_of(lengths[row]) for row in chosen}) == 1 for chosen in plan.passes(lengths))

"""The order of units is a function of seed, epoch and step; batches keep every token."""

from __future__ import annotations

import random

import pytest

from finetune.data.collate import IGNORED, Batch, BatchOrder, flattened, padded
from finetune.data.encode import Example


def example(length: int) -> Example:
    return Example(list(range(1, length + 1)), [i % 2 == 1 for i in range(length)])


def units_of(order: BatchOrder) -> list[int]:
    return [unit for step in range(order.total_steps) for unit in order.step_units(step)]


@pytest.mark.parametrize("units_per_step", [1, 3, 4, 10, 25])
def test_batch_order_epoch_has_every_unit_once(units_per_step: int):
    seen = units_of(BatchOrder(units=10, units_per_step=units_per_step, seed=1, total_units=30))
    assert all(sorted(seen[first : first + 10]) == list(range(10)) for first in (0, 10, 20))


def test_batch_order_is_independent_of_batch_size():
    orders = [units_of(BatchOrder(10, size, seed=7, total_units=25)) for size in (1, 4, 25)]
    assert orders[0] == orders[1] == orders[2]


def test_batch_order_differs_by_epoch_and_seed():
    seen = units_of(BatchOrder(50, 10, seed=7, total_units=100))
    assert seen[:50] != seen[50:]
    assert seen != units_of(BatchOrder(50, 10, seed=8, total_units=100))


def test_batch_order_of_step_needs_no_previous_step():
    order = BatchOrder(10, 4, seed=3, total_units=40)
    assert order.step_units(7) == BatchOrder(10, 4, seed=3, total_units=40).step_units(7)


def test_batch_order_only_last_step_is_short():
    order = BatchOrder(10, 4, seed=3, total_units=10)
    assert [len(order.step_units(step)) for step in range(order.total_steps)] == [4, 4, 2]
    assert order.epoch(order.total_steps) == 1.0


def test_padded_batch_masks_padding_even_if_id_occurs_in_row():
    batch = padded([example(2), example(4)], padding=4)
    assert batch.ids_BT.tolist() == [[1, 2, 4, 4], [1, 2, 3, 4]]
    assert batch.mask_BT.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.labels_BT.tolist() == [[IGNORED, 2, IGNORED, IGNORED], [IGNORED, 2, IGNORED, 4]]
    assert (batch.tokens, batch.targets) == (6, 3)


def test_targets_exclude_first_token():
    assert Example([5, 6], [True, True]).targets == 1
    assert padded([Example([5, 6], [True, True])], padding=0).targets == 1


def test_flattened_batch_restarts_positions_and_has_no_first_target():
    batch = flattened([Example([5, 6], [True, True]), Example([7, 8, 9], [True, False, True])])
    assert batch.ids_BT.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.positions_BT.tolist() == [[0, 1, 0, 1, 2]]
    assert batch.labels_BT.tolist() == [[IGNORED, 6, IGNORED, IGNORED, 9]]
    assert (batch.tokens, batch.targets, batch.mask_BT) == (5, 2, None)


def branching(count: int, seed: int) -> list[Example]:
    """Rows from a small vocabulary, many with shared prefixes; targets from a random position on, or none."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [draw.choice([3, 3, 3, 4]) for _ in range(draw.randint(2, 12))]
        begins = draw.randint(0, len(ids))
        rows.append(Example(ids, [place >= begins for place in range(len(ids))]))
    return rows


def rows_of(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """The ids and labels of each row, reconstructed from the positions."""
    rows: list[tuple[list[int], list[int]]] = []
    ids, labels, positions = (tensor[0].tolist() for tensor in (batch.ids_BT, batch.labels_BT, batch.positions_BT))
    for place, position in enumerate(positions):
        if place == 0 or position != positions[place - 1] + 1:
            rows.append(tuple(part[:position] for part in rows[-1]) if position else ([], []))
        rows[-1][0].append(ids[place])
        rows[-1][1].append(labels[place])
    return rows


@pytest.mark.parametrize("seed", range(20))
def test_shared_prefixes_keep_all_rows_and_targets(seed: int):
    rows = branching(8, seed)
    apart, shared = flattened(rows), flattened(rows, shares_prefixes=True)
    assert sorted(rows_of(shared)) == sorted(rows_of(apart))
    assert (shared.tokens, shared.targets) == (apart.tokens, apart.targets)
    assert shared.tokens == sum(len(row.ids) for row in rows)
    assert shared.ids_BT.numel() < apart.ids_BT.numel() == apart.tokens


@pytest.mark.parametrize("seed", range(20))
def test_shared_prefixes_contain_no_target_nor_its_predecessor(seed: int):
    batch = flattened(branching(8, seed), shares_prefixes=True)
    labels, positions = batch.labels_BT[0].tolist(), batch.positions_BT[0].tolist()
    begins = [place for place in range(1, len(positions)) if positions[place] != positions[place - 1] + 1]
    assert begins
    assert all(labels[place] == IGNORED for place in begins)  # the token before belongs to another row
    unshared = rows_of(batch)
    for (_, row), first in zip(unshared[1:], (positions[place] for place in begins), strict=True):
        assert row[: first + 1] == [IGNORED] * (first + 1)


def test_shared_prefixes_nest():
    system, question = [9] * 6, [5] * 4
    rows = [
        Example([*system, *question, 1, 2], [False] * 10 + [True] * 2),
        Example([*system, 7, 8], [False] * 7 + [True]),
        Example([*system, *question, 1, 3], [False] * 10 + [True] * 2),
    ]
    batch = flattened(rows, shares_prefixes=True)
    # The last token of the prompt predicts the first target, so each row has its own.
    assert batch.ids_BT.tolist() == [[*system, *question, 1, 2, question[-1], 1, 3, 7, 8]]
    assert batch.positions_BT.tolist() == [[*range(12), 9, 10, 11, 6, 7]]
    assert (batch.tokens, batch.targets) == (12 + 8 + 12, 5)

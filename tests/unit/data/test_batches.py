"""The order of rows is a function of seed, epoch and step; batches lose nothing."""

from __future__ import annotations

import pytest

from finetune.data.batches import IGNORED, BatchOrder, joined, padded
from finetune.data.encode import Example


def example(length: int) -> Example:
    return Example(list(range(1, length + 1)), [i % 2 == 1 for i in range(length)])


def units_of(order: BatchOrder) -> list[int]:
    return [unit for step in range(order.total_steps) for unit in order.step_units(step)]


@pytest.mark.parametrize("units_per_step", [1, 3, 4, 10, 25])
def test_every_epoch_sees_every_unit_once(units_per_step: int):
    seen = units_of(BatchOrder(units=10, units_per_step=units_per_step, seed=1, total_units=30))
    assert all(sorted(seen[first : first + 10]) == list(range(10)) for first in (0, 10, 20))


def test_units_come_in_the_same_order_whatever_the_batch_size():
    orders = [units_of(BatchOrder(10, size, seed=7, total_units=25)) for size in (1, 4, 25)]
    assert orders[0] == orders[1] == orders[2]


def test_epochs_and_seeds_have_orders_of_their_own():
    seen = units_of(BatchOrder(50, 10, seed=7, total_units=100))
    assert seen[:50] != seen[50:]
    assert seen != units_of(BatchOrder(50, 10, seed=8, total_units=100))


def test_a_step_needs_no_step_before_it():
    order = BatchOrder(10, 4, seed=3, total_units=40)
    assert order.step_units(7) == BatchOrder(10, 4, seed=3, total_units=40).step_units(7)


def test_only_the_last_step_is_short():
    order = BatchOrder(10, 4, seed=3, total_units=10)
    assert [len(order.step_units(step)) for step in range(order.total_steps)] == [4, 4, 2]
    assert order.epoch(order.total_steps) == 1.0


def test_padding_is_masked_and_never_a_label_though_it_is_a_token_of_the_row():
    batch = padded([example(2), example(4)], padding=4)
    assert batch.ids_BT.tolist() == [[1, 2, 4, 4], [1, 2, 3, 4]]
    assert batch.mask_BT.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.labels_BT.tolist() == [[IGNORED, 2, IGNORED, IGNORED], [IGNORED, 2, IGNORED, 4]]
    assert (batch.tokens, batch.targets) == (6, 3)


def test_the_first_token_is_not_counted_as_trained():
    assert Example([5, 6], [True, True]).targets == 1
    assert padded([Example([5, 6], [True, True])], padding=0).targets == 1


def test_examples_in_one_row_restart_positions_and_train_no_first_token():
    batch = joined([Example([5, 6], [True, True]), Example([7, 8, 9], [True, False, True])])
    assert batch.ids_BT.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.positions_BT.tolist() == [[0, 1, 0, 1, 2]]
    assert batch.labels_BT.tolist() == [[IGNORED, 6, IGNORED, IGNORED, 9]]
    assert (batch.tokens, batch.targets, batch.mask_BT) == (5, 2, None)

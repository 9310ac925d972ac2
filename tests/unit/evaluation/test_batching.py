"""Batches that are halved until they fit, and no further."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from finetune.errors import OutOfMemoryError
from finetune.evaluation.batching import in_batches

LENGTHS = [3, 50, 8, 50, 1, 0, 20, 9]


def working(most_tokens: int, batches: list[list[int]]) -> Callable[[list[int]], int]:
    """Work that fits up to so many tokens, padding included."""

    def work(rows: list[int]) -> int:
        tokens = max(LENGTHS[row] for row in rows) * len(rows)
        if tokens > most_tokens:
            raise RuntimeError("CUDA out of memory")
        batches.append(rows)
        return tokens

    return work


def test_batches_contain_every_row_once_longest_first():
    found = list(in_batches(LENGTHS, 3, working(10**6, [])))
    assert [rows for rows, _ in found] == [[1, 3, 6], [7, 2, 0], [4, 5]]
    assert [tokens for _, tokens in found] == [150, 27, 2]


def test_shortage_halves_tokens_and_short_rows_still_share_a_batch():
    batches: list[list[int]] = []
    list(in_batches(LENGTHS, 8, working(60, batches)))
    assert batches == [[1], [3], [6, 7], [2, 0, 4, 5]]


@pytest.mark.parametrize("shared", [None, [0] * 8])
def test_batches_have_rows_of_one_group(shared: list[int] | None):
    order = sorted(LENGTHS, reverse=True) if shared else LENGTHS
    groups = [int(length > 8) for length in order]
    found = [rows for rows, _ in in_batches(order, 8, lambda rows: None, shared=shared, groups=groups)]
    assert sorted(row for rows in found for row in rows) == list(range(8))
    assert [{groups[row] for row in rows} for rows in found] == [{1}, {0}]


def test_row_that_does_not_fit_by_itself_is_an_error():
    with pytest.raises(OutOfMemoryError, match="a row of 50 tokens"):
        list(in_batches(LENGTHS, 8, working(49, [])))


def test_rows_with_shared_tokens_keep_order_and_count_unshared_tokens():
    shared = [0, 3, 4, 8, 0, 0, 0, 9]
    found = [rows for rows, _ in in_batches(LENGTHS, 1, lambda rows: None, shared=shared)]
    # 3 and 47 are the 50 of one row of the longest; 8 and 42; 1, 0, 20 and none.
    assert found == [[0, 1], [2, 3], [4, 5, 6, 7]]


def test_shortage_with_shared_tokens_halves_unshared_tokens():
    batches: list[list[int]] = []

    def work(rows: list[int]) -> None:
        batches.append(rows)
        if len(batches) == 1:
            raise RuntimeError("CUDA out of memory")

    list(in_batches([40, 41, 42, 43], 4, work, shared=[0, 38, 38, 38]))
    assert batches == [[0, 1, 2, 3], [0], [1], [2], [3]]  # half of 52 tokens is less than a row


def test_error_that_is_no_shortage_is_raised_at_once():
    def work(rows: list[int]) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        list(in_batches(LENGTHS, 8, work))


def test_empty_input_yields_no_batch():
    assert list(in_batches([], 4, working(1, []))) == []

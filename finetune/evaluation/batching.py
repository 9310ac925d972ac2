"""Rows in batches that fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from finetune.errors import OutOfMemoryError, as_out_of_memory

logger = logging.getLogger(__name__)

T = TypeVar("T")


def in_batches(
    lengths: Sequence[int],
    batch_size: int,
    work: Callable[[list[int]], T],
    *,
    shared: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
    may_halve: bool = True,
) -> Iterator[tuple[list[int], T]]:
    """Process rows in batches of similar length, the longest first, so that a shortage of memory shows at once.

    Rows with shared prefixes keep their order instead: each one follows the row that it shares tokens with. A batch of
    them has at most as many tokens as `batch_size` rows of the greatest length.

    After a shortage of memory the batch is tried again with half its tokens. That number is then the limit for all
    later batches, so that shorter rows still form larger batches.

    Args:
        lengths: Tokens of each row.
        batch_size: Most rows of a batch without shared prefixes.
        work: Processes the rows of these indices.
        shared: Tokens of each row that are in the cache if the previous row is in the same batch; None where
            rows are padded to the longest of their batch.
        groups: A number for each row, by which rows follow each other in the order of batches; a batch has rows of one
            number. None for no bounds.
        may_halve: False where all processes must run the same passes; a shortage of memory is an error then.

    Yields:
        The indices of the rows of a batch, and the result of `work`.

    Raises:
        OutOfMemoryError: A row by itself does not fit.
    """
    # Shared rows keep their order: a prefix is shared with the row before.
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row]) if shared is None else list(range(len(lengths)))
    ends = _ends_of_groups([groups[row] if groups else 0 for row in order])
    done, most_tokens = 0, batch_size * max(lengths, default=0)
    while done < len(order):
        end = ends[done]
        if shared is None:
            count, tokens = _padded(lengths[order[done]], most_tokens, min(batch_size, end - done))
        else:
            count, tokens = _flattened(lengths[:end], shared, done, most_tokens)
        rows = order[done : done + count]
        try:
            result = work(rows)
        except (MemoryError, RuntimeError) as error:
            if (shortage := as_out_of_memory(error)) is None or not may_halve:
                raise
            if len(rows) == 1:
                raise OutOfMemoryError(
                    f"out of memory: a row of {tokens} tokens does not fit by itself",
                    where="evaluation",
                    hint="drop the longest rows, or lower max_new_tokens",
                ) from shortage
            # Half of this batch, not of the limit: the batch may have been far below it.
            most_tokens = tokens // 2
        else:
            done += count
            yield rows, result
            continue
        # Outside of the handler: in it, the traceback still references the tensors of the batch.
        torch.cuda.empty_cache()
        logger.warning("out of memory while evaluating: batches have at most %d tokens from here on", most_tokens)


def _ends_of_groups(numbers: Sequence[int]) -> list[int]:
    """For each index the end of the equal numbers from there on."""
    ends = [len(numbers)] * len(numbers)
    for index in range(len(numbers) - 2, -1, -1):
        ends[index] = ends[index + 1] if numbers[index] == numbers[index + 1] else index + 1
    return ends


def _padded(longest: int, most_tokens: int, most_rows: int) -> tuple[int, int]:
    """The number of rows of the next batch, at least 1, and its tokens with padding."""
    count = max(1, min(most_rows, most_tokens // max(1, longest)))
    return count, count * longest


def _flattened(lengths: Sequence[int], shared: Sequence[int], first: int, most_tokens: int) -> tuple[int, int]:
    """The same for flattened rows from `first` on: each further row adds only the tokens that it does not share."""
    count, tokens = 1, lengths[first]
    for row in range(first + 1, len(lengths)):
        if tokens + lengths[row] - shared[row] > most_tokens:
            break
        count, tokens = count + 1, tokens + lengths[row] - shared[row]
    return count, tokens

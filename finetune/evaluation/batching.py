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
    may_halve: bool = True,
) -> Iterator[tuple[list[int], T]]:
    """Work on rows of like length together, the longest first, so that a shortage of memory shows at once.

    Rows that share tokens stay as they are given instead, each after the one that it shares them with, and as many of
    them go together as have no more tokens than `batch_size` of the longest.

    A batch that does not fit is tried again with half its tokens, which from then on are the most of any batch:
    shorter rows still go through in larger numbers.

    Args:
        lengths: Tokens of each row.
        batch_size: Most rows of a batch, if they share nothing.
        work: Told the numbers of a batch's rows.
        shared: How many tokens each row need not be computed for if the row before it is in the same batch; None where
            rows are padded to the longest of their batch.
        may_halve: False where other processes have to make the same passes: what does not fit is an error then.

    Yields:
        The numbers of the rows and what came of them.

    Raises:
        OutOfMemoryError: A row by itself does not fit.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row]) if shared is None else list(range(len(lengths)))
    done, most_tokens = 0, batch_size * max(lengths, default=0)
    while done < len(order):
        if shared is None:
            count, tokens = _padded(lengths[order[done]], most_tokens, min(batch_size, len(order) - done))
        else:
            count, tokens = _in_one_line(lengths, shared, done, most_tokens)
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
                    hint="leave out the longest rows, or answer shorter",
                ) from shortage
            most_tokens = tokens // 2
        else:
            done += count
            yield rows, result
            continue
        torch.cuda.empty_cache()  # out of the handler, where the traceback holds the batch's tensors no more
        logger.warning("out of memory while evaluating: on with %d tokens at once", most_tokens)


def _padded(longest: int, most_tokens: int, most_rows: int) -> tuple[int, int]:
    """How many rows go together, at least one, and their tokens with the padding."""
    count = max(1, min(most_rows, most_tokens // max(1, longest)))
    return count, count * longest


def _in_one_line(lengths: Sequence[int], shared: Sequence[int], first: int, most_tokens: int) -> tuple[int, int]:
    """The same from a row on, by the tokens that each of the others adds."""
    count, tokens = 1, lengths[first]
    for row in range(first + 1, len(lengths)):
        if tokens + lengths[row] - shared[row] > most_tokens:
            break
        count, tokens = count + 1, tokens + lengths[row] - shared[row]
    return count, tokens

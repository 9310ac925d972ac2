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
    lengths: Sequence[int], batch_size: int, work: Callable[[list[int]], T], may_halve: bool = True
) -> Iterator[tuple[list[int], T]]:
    """Work on rows of like length together, the longest first, so that a shortage of memory shows at once.

    A batch that does not fit is tried again with half its tokens, which from then on are the most of any batch:
    shorter rows still go through in larger numbers.

    Args:
        lengths: Tokens of each row.
        batch_size: Most rows of a batch.
        work: Told the numbers of a batch's rows.
        may_halve: False where other processes have to make the same passes: what does not fit is an error then.

    Yields:
        The numbers of the rows and what came of them.

    Raises:
        OutOfMemoryError: A row by itself does not fit.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    done, most_tokens = 0, None
    while done < len(order):
        longest = max(1, lengths[order[done]])
        fitting = batch_size if most_tokens is None else max(1, min(batch_size, most_tokens // longest))
        rows = order[done : done + fitting]
        try:
            result = work(rows)
        except (MemoryError, RuntimeError) as error:
            if (shortage := as_out_of_memory(error)) is None or not may_halve:
                raise
            if len(rows) == 1:
                raise OutOfMemoryError(
                    f"out of memory: a row of {longest} tokens does not fit by itself",
                    where="evaluation",
                    hint="leave out the longest rows, or answer shorter",
                ) from shortage
            most_tokens = longest * len(rows) // 2
        else:
            done += len(rows)
            yield rows, result
            continue
        torch.cuda.empty_cache()  # out of the handler, where the traceback holds the batch's tensors no more
        logger.warning("out of memory while evaluating: on with %d tokens at once", most_tokens)

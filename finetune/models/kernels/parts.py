"""Loops over parts of tensors, which a trace of memory and FLOPs can shorten.

Kernels on a CPU work on a few rows at a time, so that temporaries stay in the cache. A trace without data would run
hundreds of equal iterations for a long row; it runs the first two and the last, and counts the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

Shorten = Callable[[Sequence[Any], Callable[[Any], int]], Iterator[Any]]
"""From the iterations of a loop, and the size of each, to those that run."""

# No ContextVar: compiled kernels read it, and torch.compile guards on a global.
_shorten: Shorten | None = None


@contextmanager
def loops_shortened(shorten: Shorten) -> Iterator[None]:
    """Let loops over parts run only the iterations that `shorten` yields, within the block."""
    global _shorten
    before, _shorten = _shorten, shorten
    try:
        yield
    finally:
        _shorten = before


def row_parts(rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of tensors (N, ...): views of the same `rows` rows of each; the last part may have fewer."""
    if _shorten is None:
        return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    count = len(tensors[0])
    starts = _shorten(range(0, count, rows), lambda start: min(rows, count - start))
    return (tuple(tensor[start : start + rows] for tensor in tensors) for start in starts)


def iterations(items: Iterator[Any], size: Callable[[Any], int]) -> Iterator[Any]:
    """The iterations of a loop, largest first but for the first one.

    Args:
        items: The iterations. All but the first allocate no more than the one before.
        size: Of an iteration: its FLOPs are linear in it, except for the first iteration.
    """
    return items if _shorten is None else _shorten(list(items), size)

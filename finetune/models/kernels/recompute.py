"""Activations that backward makes again instead of keeping them, where that costs little beside the products.

What comes out of a norm or of a gate is read by products, and autograd keeps it for their gradients. It can be made
again, bit for bit, from what the norm or the gate keeps in any case, which may itself be something that is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple
from weakref import finalize

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass
class _Recomputable:
    """A tensor that is not kept.

    Attributes:
        make: Makes it again from `sources`.
        sources: What it comes from, as it is kept.
        dtype: Its type.
        version: How often it had been written to when it was made.
        uses: Places that have yet to ask for it: in the graph, and tensors that come from it.
        made: What was made, until the last of them has it.
    """

    make: Callable[..., Tensor]
    sources: tuple[Tensor | _Part, ...]
    dtype: torch.dtype
    version: int
    uses: int = 0
    made: Tensor | None = None

    def again(self) -> Tensor:
        """The tensor, for one of the places."""
        self.uses -= 1
        made = self.make(*map(_given, self.sources)) if self.made is None else self.made
        self.made = made if self.uses > 0 else None
        return made


class _Part(NamedTuple):
    """A view of a tensor that is not kept, or all of it."""

    of: _Recomputable
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int | torch.SymInt


_remade: ContextVar[dict[int, _Recomputable] | None] = ContextVar("_remade", default=None)
"""Of the pass that is under way, by the storages of the tensors."""


@contextmanager
def saving_inputs_only() -> Iterator[None]:
    """In the block, a forward pass, autograd does not keep what `recomputable` says of."""
    known: dict[int, _Recomputable] = {}
    before = _remade.set(known)
    try:
        with saved_tensors_hooks(lambda tensor: _kept(tensor, known), _given):
            yield
    finally:
        _remade.reset(before)


@contextmanager
def saving_everything() -> Iterator[None]:
    """In the block, a part of such a pass, nothing is said of any tensor."""
    before = _remade.set(None)
    try:
        yield
    finally:
        _remade.reset(before)


def recomputable(tensor: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """Say of a tensor that has just been made how to make it again, with the same bits.

    Args:
        tensor: All that lies in its memory.
        make: Given `sources`, makes the tensor, laid out as it is.
        sources: What it is made from. They are kept, unless they can be made again themselves.

    Returns:
        The tensor.
    """
    if (known := _remade.get()) is not None:
        storage = tensor.untyped_storage()
        kept = tuple(_kept(source.detach(), known) for source in sources)
        known[storage._cdata] = _Recomputable(make, kept, tensor.dtype, tensor._version)
        finalize(storage, known.pop, storage._cdata)
    return tensor


def _kept(tensor: Tensor, known: dict[int, _Recomputable]) -> Tensor | _Part:
    found = known.get(tensor.untyped_storage()._cdata)
    if found is None or tensor.dtype != found.dtype or tensor._version != found.version:
        return tensor
    found.uses += 1
    return _Part(found, tensor.shape, tensor.stride(), tensor.storage_offset())


def _given(kept: Tensor | _Part) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    return kept.of.again().as_strided(kept.shape, kept.strides, kept.offset)

"""Activations that backward makes again instead of keeping them, where that costs little beside the products.

What comes out of a norm or of a gate is read by products, and autograd keeps it for their gradients. It can be made
again, bit for bit, from what the norm or the gate keeps in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from weakref import finalize

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass
class _Remade:
    """A tensor that is not kept.

    Attributes:
        make: Makes it again.
        uses: Places in the graph that have yet to ask for it.
        made: What was made, until the last of them has it.
    """

    make: Callable[[], Tensor]
    uses: int = 0
    made: Tensor | None = None

    def again(self) -> Tensor:
        """The tensor, for one of the places."""
        self.uses -= 1
        made = self.make() if self.made is None else self.made
        self.made = made if self.uses > 0 else None
        return made


_remade: ContextVar[dict[int, _Remade] | None] = ContextVar("_remade", default=None)
"""Of the pass that is under way, by the storages of the tensors."""


@contextmanager
def keeping_little() -> Iterator[None]:
    """In the block, a forward pass, autograd does not keep what `can_be_made` says of."""
    known: dict[int, _Remade] = {}

    def keep(tensor: Tensor) -> Tensor | tuple[_Remade, torch.Size]:
        storage = tensor.untyped_storage()
        found = known.get(storage._cdata)
        if found is None or storage.nbytes() != tensor.nbytes or not tensor.is_contiguous():
            return tensor
        found.uses += 1
        return found, tensor.shape

    def give(kept: Tensor | tuple[_Remade, torch.Size]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        found, shape = kept
        return found.again().view(shape)

    before = _remade.set(known)
    try:
        with saved_tensors_hooks(keep, give):
            yield
    finally:
        _remade.reset(before)


def can_be_made(tensor: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """Say of a tensor that has just been made how to make it again, with the same bits; returns it."""
    if (known := _remade.get()) is not None:
        storage = tensor.untyped_storage()
        known[storage._cdata] = _Remade(make)
        finalize(storage, known.pop, storage._cdata)
    return tensor

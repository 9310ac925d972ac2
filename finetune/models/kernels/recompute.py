"""Activation recomputation for single tensors: backward recomputes cheap activations instead of saving them.

The output of a norm or a gate is the input of matmuls, and autograd saves it for their gradients. It can be recomputed,
bit for bit, from the tensors that the norm or the gate saves in any case. These may themselves be recomputable.

`saved_tensors_hooks` sees every tensor that autograd saves within `saving_inputs_only`. A tensor whose storage was
registered by `recomputable` is replaced by a recipe for it (`_SavedView`), and recomputed when backward unpacks it.
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
    """A tensor that is recomputed instead of saved.

    Attributes:
        make: Recomputes it from `sources`.
        sources: The arguments of `make`: saved tensors, or views of recomputable ones.
        dtype: Its dtype.
        version: Its version counter when it was computed.
        uses: Number of pending uses: saved tensors of the graph, and sources of other recomputable tensors.
        recomputed: The recomputed tensor, until its last use.
    """

    make: Callable[..., Tensor]
    sources: tuple[Tensor | _SavedView, ...]
    dtype: torch.dtype
    version: int
    uses: int = 0
    recomputed: Tensor | None = None

    def recompute(self) -> Tensor:
        """The tensor, for one of its uses. It is computed at the first use and released at the last."""
        # `uses` goes below zero in a second backward pass over a retained graph: then each use recomputes.
        self.uses -= 1
        recomputed = self.make(*map(_unpack, self.sources)) if self.recomputed is None else self.recomputed
        self.recomputed = recomputed if self.uses > 0 else None
        return recomputed


class _SavedView(NamedTuple):
    """A view of a recomputable tensor, or all of it, in the place of the saved tensor."""

    base: _Recomputable
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int | torch.SymInt


_registry: ContextVar[dict[int, _Recomputable] | None] = ContextVar("_registry", default=None)
"""Recomputable tensors of the current forward pass, by the address of their storage; None outside of one."""


@contextmanager
def saving_inputs_only() -> Iterator[None]:
    """A context for a forward pass in which autograd does not save the tensors registered by `recomputable`."""
    registry: dict[int, _Recomputable] = {}
    token = _registry.set(registry)
    try:
        with saved_tensors_hooks(lambda tensor: _pack(tensor, registry), _unpack):
            yield
    finally:
        _registry.reset(token)


@contextmanager
def saving_everything() -> Iterator[None]:
    """A context within such a forward pass in which `recomputable` registers nothing."""
    token = _registry.set(None)
    try:
        yield
    finally:
        _registry.reset(token)


def recomputable(tensor: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """Register how to recompute a tensor that has just been computed.

    Args:
        tensor: The tensor; it must fill its storage.
        make: Computes the tensor from `sources` with the same bits, shape and strides.
        sources: The arguments of `make`. They are saved, unless they are recomputable themselves.

    Returns:
        The tensor.
    """
    if (registry := _registry.get()) is not None:
        storage = tensor.untyped_storage()
        # Detached: `make` runs in backward without a graph, and the sources' own graph must not be kept alive by it.
        saved = tuple(_pack(source.detach(), registry) for source in sources)
        registry[storage._cdata] = _Recomputable(make, saved, tensor.dtype, tensor._version)
        # The address of a freed storage is reused by another tensor, which must not be taken for this one.
        finalize(storage, registry.pop, storage._cdata)
    return tensor


def _pack(tensor: Tensor, registry: dict[int, _Recomputable]) -> Tensor | _SavedView:
    """Pack hook: the tensor, or a view of a recomputable one."""
    found = registry.get(tensor.untyped_storage()._cdata)
    # A higher version: the tensor was written to in place since, and recomputing would give its old values.
    if found is None or tensor.dtype != found.dtype or tensor._version != found.version:
        return tensor
    found.uses += 1
    return _SavedView(found, tensor.shape, tensor.stride(), tensor.storage_offset())


def _unpack(saved: Tensor | _SavedView) -> Tensor:
    """Unpack hook: the inverse of `_pack`."""
    if isinstance(saved, Tensor):
        return saved
    return saved.base.recompute().as_strided(saved.shape, saved.strides, saved.offset)

"""Fully sharded data parallelism (PyTorch's FSDP2): each process holds one shard of every base weight.

FSDP units are the decoder blocks and, as the root unit, the non-block parameters (embeddings, final norm, head). The
parameters that an adapter method adds are small, and are replicated in every process.

Source: Zhao et al. 2023, arXiv 2304.11277, section 3; Rajbhandari et al. 2020 (ZeRO, stage 3), arXiv 1910.02054.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from finetune.malloc import trim_heap
from finetune.models.safetensors_io import StoredTensor


def shard_model(model: nn.Module, blocks: Iterable[str], fill: Callable[[str], None], device: torch.device) -> None:
    """Shard every parameter by rows (dim 0): equal shards, but for the last ranks'.

    Compute dtypes are those of an unsharded model: weights are all-gathered in their own dtype, and autocast casts
    them. Without gradients the non-block parameters are resharded after each forward pass; in training they stay
    unsharded until the backward pass is over.

    Args:
        model: A base; changed in place.
        blocks: The names of its decoder blocks.
        fill: Called with the name of a block, or "" for the non-block parameters, before they are sharded; loads them.
        device: This process's.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for name in (*blocks, ""):
        fill(name)
        fully_shard(model.get_submodule(name), mesh=mesh)
        if device.type == "cpu":
            # The full weights have just been freed. Without this, glibc would keep their memory.
            trim_heap()
    # FSDP2 keeps the root unit unsharded after its forward pass, since backward needs it at once.
    model.register_forward_hook(_reshard_outside_of_training)


def _reshard_outside_of_training(model: Any, args: Any, output: Any) -> None:
    """Forward hook: there is no backward pass to wait for where gradients are off."""
    if not torch.is_grad_enabled():
        model.reshard()


def sharded_base(model: nn.Module) -> FSDPModule | None:
    """The root FSDP unit within `model`: its base, if that is sharded."""
    return next((module for module in model.modules() if isinstance(module, FSDPModule)), None)


def is_sharded_tensor(tensor: Tensor | None) -> bool:
    """Whether this process holds one shard of the tensor, and not all of it."""
    return isinstance(tensor, DTensor)


def sharded_trainable_params(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters that are sharded."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad and is_sharded_tensor(parameter)]


def trains_through_blocks(base: Any) -> bool:
    """Whether gradients reach the blocks of a base: a parameter in them, or the input embedding, is trainable."""
    units = [module for module in base.modules() if isinstance(module, FSDPModule) and module is not base]
    return any(
        parameter.requires_grad for unit in (base.get_input_embeddings(), *units) for parameter in unit.parameters()
    )


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def full_tensor(tensor: Tensor) -> Tensor:
    """The unsharded tensor. Collective for a sharded one: every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def all_gathered(tensors: Mapping[str, Tensor]) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Full tensors by name, all-gathered one at a time. Collective: every rank must enter this with the same names.

    The context all-gathers on exit the tensors that its body did not consume, after an error too: the other ranks are
    waiting in the same collective and would hang.
    """
    pending = ((name, full_tensor(tensor)) for name, tensor in tensors.items())
    try:
        yield pending
    finally:
        for _ in pending:
            pass


@contextmanager
def unsharded_weights(module: nn.Module) -> Iterator[None]:
    """A context in which a module's weights are unsharded. Collective for a sharded module: every rank must enter it.

    Unlike `FSDPModule.unshard` it takes any module, also a part of a unit such as a single norm. The full weights are
    copies without gradients.
    """
    shards = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and is_sharded_tensor(parameter)
    ]
    for owner, name, shard in shards:
        owner._parameters[name] = nn.Parameter(full_tensor(shard), requires_grad=False)
    try:
        yield
    finally:
        for owner, name, shard in shards:
            owner._parameters[name] = shard


@contextmanager
def unsharded_non_block(model: nn.Module) -> Iterator[None]:
    """A context in which the non-block parameters are unsharded. Collective: every rank must enter it."""
    base = sharded_base(model)
    if base is None:
        yield
        return
    base.unshard()
    try:
        yield
    finally:
        base.reshard()


def unshard_non_block(model: nn.Module) -> None:
    """All-gather the non-block parameters now; the base's next forward pass would do it a moment later."""
    if (base := sharded_base(model)) is not None:
        base.unshard()


def read_like(stored: StoredTensor, like: Tensor | None) -> Tensor:
    """A tensor from a file; if `like` is sharded and of the same shape, only this rank's shard is read."""
    if not isinstance(like, DTensor) or tuple(like.shape) != stored.shape:
        return stored.read()
    shard, mesh = local_shard(like), like.device_mesh
    # FSDP2 splits dim 0 as `torch.chunk` does: shards of ceil(rows / ranks) rows, the last ranks' shorter or empty.
    first = min(-(-stored.shape[0] // mesh.size()) * mesh.get_local_rank(), stored.shape[0])
    rows = stored.rows(first, first + len(shard)).read()
    # `run_check=False`: shapes are known to match, and the check would be a collective for every tensor.
    return DTensor.from_local(
        rows.to(shard.device), mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )

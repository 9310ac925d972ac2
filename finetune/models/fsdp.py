"""A base of whose weights each process holds a share: PyTorch's FSDP2.

The base alone is shared out, unit by unit: its decoder blocks, and what stands around them. What a method adds to it is
small, and stays whole in every process.

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
    """Leave of every parameter the rows of this process, the same number in each but for the last ones.

    Passes compute in the types that they compute in without shares: weights are put together in their own, and autocast
    casts them. Outside of training the weights around blocks are parted again after each pass; while training they
    stay until the backward pass is over.

    Args:
        model: A base; changed in place.
        blocks: The names of its decoder blocks.
        fill: Told the name of a block, or "" for the rest, before its weights must be there.
        device: Of this process.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for name in (*blocks, ""):
        fill(name)
        fully_shard(model.get_submodule(name), mesh=mesh)
        if device.type == "cpu":
            trim_heap()  # the other processes' rows
    model.register_forward_hook(_reshard_outside_of_training)


def _reshard_outside_of_training(model: Any, args: Any, output: Any) -> None:
    if not torch.is_grad_enabled():
        model.reshard()


def sharded_base(model: nn.Module) -> FSDPModule | None:
    """The base within `model`, if processes hold shares of it."""
    return next((module for module in model.modules() if isinstance(module, FSDPModule)), None)


def is_sharded_tensor(tensor: Tensor | None) -> bool:
    """Whether this process holds a share of the tensor, and not all of it."""
    return isinstance(tensor, DTensor)


def sharded_trainable_params(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train and of which this process holds a share."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad and is_sharded_tensor(parameter)]


def trains_through_blocks(base: Any) -> bool:
    """Whether gradients reach the blocks of a base: something in them trains, or what they are given does."""
    units = [module for module in base.modules() if isinstance(module, FSDPModule) and module is not base]
    return any(
        parameter.requires_grad for unit in (base.get_input_embeddings(), *units) for parameter in unit.parameters()
    )


def local_shard(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """A tensor put together; of shares, every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def put_together(tensors: Mapping[str, Tensor]) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Whole tensors by name, one at a time.

    What the block leaves, by an error too, is put together all the same: the other processes wait for it.
    """
    pending = ((name, whole(tensor)) for name, tensor in tensors.items())
    try:
        yield pending
    finally:
        for _ in pending:
            pass


@contextmanager
def unsharded_weights(module: nn.Module) -> Iterator[None]:
    """The time in which a module's weights are whole in this process; of shares, every process must come here."""
    shares = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and is_sharded_tensor(parameter)
    ]
    for owner, name, share in shares:
        owner._parameters[name] = nn.Parameter(whole(share), requires_grad=False)
    try:
        yield
    finally:
        for owner, name, share in shares:
            owner._parameters[name] = share


@contextmanager
def unsharded_non_block(model: nn.Module) -> Iterator[None]:
    """The time in which what stands around the blocks is whole, as embeddings are; every process must come here."""
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
    """Make what stands around the blocks whole now, which a pass of the base would do a moment later."""
    if (base := sharded_base(model)) is not None:
        base.unshard()


def read_like(stored: StoredTensor, like: Tensor | None) -> Tensor:
    """A tensor from a file; where `like` is a share of such a tensor, the same share, and no more of it is read."""
    if not isinstance(like, DTensor) or tuple(like.shape) != stored.shape:
        return stored.read()
    share, mesh = local_shard(like), like.device_mesh
    first = min(-(-stored.shape[0] // mesh.size()) * mesh.get_local_rank(), stored.shape[0])
    rows = stored.rows(first, first + len(share)).read()
    return DTensor.from_local(
        rows.to(share.device), mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )

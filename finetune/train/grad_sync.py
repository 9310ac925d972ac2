"""Gradient synchronization between ranks, and the global gradient norm.

Under DDP every rank has the full model, and PyTorch averages gradients during the backward pass. With a sharded base,
FSDP2 does so for sharded weights. Adapter weights are replicated there, and their gradients are averaged here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from finetune.adapters.base import trainable
from finetune.models.fsdp import is_sharded_tensor, local_shard, sharded_base


def wrap_for_ddp(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Wrap the model for DDP; replicated trainable parameters are broadcast from rank 0.

    With a sharded base the model is returned as it is, after the broadcast: FSDP2 works in place.
    """
    if sharded_base(model) is None:
        # All ranks have read the same base, so DDP need not broadcast it. It would do so once for frozen weights, which
        # copies memory-mapped ones into memory, and before every step for buffers, such as scales of quantized layers.
        frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
        frozen.update(name for name, _ in model.named_buffers())
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
        wrapped: nn.Module = accelerator.prepare_model(model)
        return wrapped
    for parameter in trainable(model).values():
        if not is_sharded_tensor(parameter):
            torch.distributed.broadcast(parameter.data, src=0)
    return model


@contextmanager
def no_grad_sync(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Accumulate gradients locally during the block: no communication in its backward passes."""
    base = sharded_base(model)
    if base is None:
        with accelerator.no_sync(model):
            yield
        return
    base.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        base.set_requires_gradient_sync(True)


def allreduce_replicated_grads(accelerator: Accelerator, model: nn.Module) -> None:
    """Average the gradients of replicated parameters over all ranks; only needed with a sharded base.

    Call it after the last backward pass of a step.
    """
    if sharded_base(model) is None:
        return
    gradients = [
        weight.grad for weight in trainable(model).values() if weight.grad is not None and not is_sharded_tensor(weight)
    ]
    if not gradients:
        return
    # One flat tensor: one collective instead of one for each of several hundred small factors.
    mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def gradient_norm(accelerator: Accelerator, gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all gradients as one vector, a scalar; of sharded ones, over the shards of all ranks."""
    norm = torch.nn.utils.get_total_norm([local_shard(gradient) for gradient in gradients])
    if not any(map(is_sharded_tensor, gradients)):
        return norm
    assert all(map(is_sharded_tensor, gradients)), "trainable parameters are either all sharded or all replicated"
    # Shards are disjoint parts of the vector, so squared norms add up.
    squares: Tensor = accelerator.reduce(norm.double().square(), "sum")
    return squares.sqrt().to(norm.dtype)

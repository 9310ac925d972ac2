"""What the processes of a run do together in a step: when gradients become those of all, and how large they are.

Under DDP every process has the whole model, and PyTorch sums gradients as they come. Where processes hold shares of the
base, FSDP2 does so for its weights; what a method adds to it is whole in each, and its gradients are summed here.
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


def prepared(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model as all processes train it; what trains, and they do not hold shares of, is the main one's.

    All of them have read the same base, so none is sent: DDP would send the weights once, which copies those that lie
    in a mapped file, and the scales of quantized ones before each step.
    """
    if sharded_base(model) is None:
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
def accumulating(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """The time in which gradients stay with their process and add up."""
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
    """After the last backward pass of a step: the mean over processes of the gradients of what is whole in each."""
    if sharded_base(model) is None:
        return
    gradients = [
        weight.grad for weight in trainable(model).values() if weight.grad is not None and not is_sharded_tensor(weight)
    ]
    if not gradients:
        return
    mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def gradient_norm(accelerator: Accelerator, gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients as of one vector; of shares, that of all processes' shares."""
    norm = torch.nn.utils.get_total_norm([local_shard(gradient) for gradient in gradients])
    if not any(map(is_sharded_tensor, gradients)):
        return norm
    assert all(map(is_sharded_tensor, gradients)), "what trains is either of the base or beside it"
    squares: Tensor = accelerator.reduce(norm.double().square(), "sum")
    return squares.sqrt().to(norm.dtype)

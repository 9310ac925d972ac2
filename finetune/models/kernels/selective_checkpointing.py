"""Selective checkpointing: what the widening layers of a model's blocks put out is computed again in backward.

In a block with gated units the outputs of gate and up are half of what backward needs, and half of the products of a
forward pass. Blocks that are computed again whole keep less, and cost all of those products.

Source: the trade is that of Korthikanti et al. 2022, arXiv 2205.05198, section 5, which makes it for attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finetune.models.kernels.recompute import recomputable
from finetune.models.linear_layers import linear_layers, list_of_blocks, shape_of


def up_projections(base: PreTrainedModel) -> list[str]:
    """Names of the linear layers in a model's blocks that have more outputs than inputs; before adapters come."""
    layers = linear_layers(base)
    blocks = list_of_blocks(base, layers)
    shapes = {name: shape_of(layer) for name, layer in layers.items() if name.startswith(f"{blocks}.")}
    return [name for name, (out_features, in_features) in shapes.items() if out_features > in_features]


def recompute_outputs(base: PreTrainedModel, names: list[str]) -> str:
    """Have the outputs of layers computed again in backward, by the same products, instead of kept.

    Args:
        base: With the adapters that it gets; changed in place.
        names: Of its layers, as `up_projections` finds them.

    Returns:
        What was done, in words.
    """
    for name in names:
        layer = base.get_submodule(name)
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
    return f"outputs of {len(names)} widening layers are computed again in backward"


class _ForwardContext(NamedTuple):
    """What decides about the output of a layer beside its input and its numbers.

    Attributes:
        device: Its device.
        autocast: The type that autocast computes in, if it does.
        cpu: State of the CPU's random numbers, which dropout draws from.
        gpu: State of the GPU's, if the layer is on one.
    """

    device: torch.device
    autocast: torch.dtype | None
    cpu: Tensor
    gpu: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> _ForwardContext:
        """Those before a layer's forward pass."""
        casts = torch.is_autocast_enabled(device.type)
        autocast = torch.get_autocast_dtype(device.type) if casts else None
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, autocast, torch.get_rng_state(), gpu)

    @contextmanager
    def again(self) -> Iterator[None]:
        """In the block they are as they were; gradients too, for with them an adapted layer has other passes."""
        casts = torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
        with torch.random.fork_rng([] if self.gpu is None else [self.device]), casts, torch.enable_grad():
            torch.set_rng_state(self.cpu)
            if self.gpu is not None:
                torch.cuda.set_rng_state(self.gpu, self.device)
            yield


def _forward(layer: Any, x: Tensor) -> Tensor:
    """A layer's own pass, with what `recomputable` has to know of it."""
    own = type(layer).forward
    if not torch.is_grad_enabled():
        inferred: Tensor = own(layer, x)
        return inferred
    circumstances = _ForwardContext.now(x.device)
    output: Tensor = own(layer, x)
    return recomputable(output, partial(_computed, layer, circumstances), x)


def _computed(layer: Any, circumstances: _ForwardContext, x: Tensor) -> Tensor:
    with circumstances.again():
        output: Tensor = type(layer).forward(layer, x).detach()
    return output

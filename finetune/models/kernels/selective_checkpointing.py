"""Selective checkpointing: the outputs of the up projections in a model's blocks are recomputed in backward.

In a block with a gated MLP the outputs of gate and up are half of the saved activations, and cost half of the forward
pass's matmuls. Recomputing whole blocks (gradient checkpointing) saves more memory, and costs all of those matmuls.

Source: the idea is that of Korthikanti et al. 2022, arXiv 2205.05198, section 5, which applies it to attention.
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
    """Names of the linear layers in a model's blocks with out_features > in_features.

    Args:
        base: Without an adapter: methods wrap and rename layers.
    """
    layers = linear_layers(base)
    blocks = list_of_blocks(base, layers)
    shapes = {name: shape_of(layer) for name, layer in layers.items() if name.startswith(f"{blocks}.")}
    return [name for name, (out_features, in_features) in shapes.items() if out_features > in_features]


def recompute_outputs(base: PreTrainedModel, names: list[str]) -> str:
    """Recompute the outputs of layers in backward instead of saving them, within `saving_inputs_only`.

    Args:
        base: With its adapters attached; changed in place.
        names: Names of its layers, from `up_projections`.

    Returns:
        A summary for the log.
    """
    for name in names:
        layer = base.get_submodule(name)
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
    return f"outputs of {len(names)} up projections are recomputed in backward"


class _ForwardContext(NamedTuple):
    """The state that a layer's output depends on beside its input and its parameters.

    Attributes:
        device: The layer's device.
        autocast: Autocast's dtype; None where it is off.
        cpu: State of the CPU's random number generator, for dropout.
        gpu: State of the GPU's generator, if the layer is on one.
    """

    device: torch.device
    autocast: torch.dtype | None
    cpu: Tensor
    gpu: Tensor | None

    @classmethod
    def current(cls, device: torch.device) -> _ForwardContext:
        """The state before a layer's forward pass."""
        casts = torch.is_autocast_enabled(device.type)
        autocast = torch.get_autocast_dtype(device.type) if casts else None
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, autocast, torch.get_rng_state(), gpu)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """A context with this state; the generators have their later states again after it."""
        casts = torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
        # Gradients are enabled in the recompute, though its result is detached: an adapted layer takes another path
        # without them, whose rounding may differ.
        with torch.random.fork_rng([] if self.gpu is None else [self.device]), casts, torch.enable_grad():
            torch.set_rng_state(self.cpu)
            if self.gpu is not None:
                torch.cuda.set_rng_state(self.gpu, self.device)
            yield


def _forward(layer: Any, x: Tensor) -> Tensor:
    """The layer's own forward pass, whose output is registered as recomputable."""
    # Of the class, not of an instance: a deep copy of the layer must compute with its own weights.
    original = type(layer).forward
    if not torch.is_grad_enabled():
        inferred: Tensor = original(layer, x)
        return inferred
    context = _ForwardContext.current(x.device)
    output: Tensor = original(layer, x)
    return recomputable(output, partial(_recomputed, layer, context), x)


def _recomputed(layer: Any, context: _ForwardContext, x: Tensor) -> Tensor:
    with context.restored():
        output: Tensor = type(layer).forward(layer, x).detach()
    return output

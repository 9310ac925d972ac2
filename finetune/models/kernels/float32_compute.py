"""Computing in float32 over weights that are stored in 16 bits.

Autocast knows no float32: without it a model computes in the type of its weights. Here each matmul and lookup converts
its weight for itself, in the forward and in the backward pass, so that no second copy of the weights stays in memory.

Shape legend: O out_features, I in_features, `...` any leading dimensions.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune.quantizers.base import is_quantized

STORED = (nn.Linear, Conv1D, nn.Embedding)
"""Types of layers whose weight stays in 16 bits. All other weights are converted; most of them are vectors."""


def compute_in_float32(model: PreTrainedModel) -> None:
    """Make a model with 16-bit weights compute in float32, with the values that it stores.

    Args:
        model: As it is loaded; changed in place.
    """
    for module in model.modules():
        is_stored = isinstance(module, STORED) and not is_quantized(module)
        for name, parameter in module.named_parameters(recurse=False):
            if _is_narrow(parameter) and not (is_stored and name == "weight"):
                parameter.data = parameter.data.float()
        for name, buffer in module.named_buffers(recurse=False):
            if _is_narrow(buffer):
                module._buffers[name] = buffer.float()
        if is_stored and _is_narrow(module.weight):
            # A bound method, which copies of the module (`modules_to_save`) bind to themselves.
            module.forward = MethodType(_forward_of(module), module)
    model.computes_in_float32 = True


def computes_in(model: Any) -> torch.dtype:
    """The dtype of a model's activations without autocast."""
    dtype: torch.dtype = torch.float32 if getattr(model, "computes_in_float32", False) else model.dtype
    return dtype


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize == 2


def _forward_of(module: nn.Module) -> Any:
    if type(module) is nn.Embedding:
        return _lookup
    return _matmul if type(module) in (nn.Linear, Conv1D) else _own_pass


def _lookup(layer: nn.Embedding, input: Tensor) -> Tensor:
    return nn.Embedding.forward(layer, input).float()


def _matmul(layer: Any, input: Tensor) -> Tensor:
    """The layer's output in float32; (..., I) -> (..., O)."""
    if layer.weight.requires_grad:
        weight = layer.weight.float()
        return functional.linear(input.float(), weight.T if isinstance(layer, Conv1D) else weight, layer.bias)
    product: Tensor = _Matmul.apply(input.float(), layer)
    return product if layer.bias is None else product + layer.bias


def _own_pass(layer: nn.Module, *inputs: Any) -> Any:
    """The forward pass of a layer's own class, with its weight in float32."""
    stored = layer._parameters["weight"]
    assert stored is not None
    layer._parameters["weight"] = stored.float()  # type: ignore[assignment]
    try:
        wide = [each.float() if isinstance(each, Tensor) and _is_narrow(each) else each for each in inputs]
        return type(layer).forward(layer, *wide)
    finally:
        layer._parameters["weight"] = stored


class _Matmul(torch.autograd.Function):
    """x W^T with a frozen 16-bit W, converted in each direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, _wide(layer))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        return (gradient @ _wide(ctx.layer) if ctx.needs_input_grad[0] else None), None


def _wide(layer: Any) -> Tensor:
    weight: Tensor = layer.weight.detach().float()
    return weight.T if isinstance(layer, Conv1D) else weight

"""The linear layers of a model: finding them, counting parameters, dequantizing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune.quantizers.base import Quantized, is_quantized

LINEAR_TYPES = (nn.Linear, Conv1D)
"""Types of layers with a weight matrix; quantized layers are subclasses."""


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers of a model without adapter, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LINEAR_TYPES)}


def shape_of(layer: Any) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer, also of a quantized or transposed one (`Conv1D`)."""
    if is_quantized(layer):
        return layer.out_features, layer.in_features
    first, second = layer.weight.shape
    return (second, first) if isinstance(layer, Conv1D) else (first, second)


def list_of_blocks(model: nn.Module, layers: Iterable[str]) -> str | None:
    """The name of the outermost `ModuleList` with most of `layers`: a model's decoder blocks; None if there is none."""
    lists = [_outermost_list(model, name) for name in layers]
    counts = Counter(name for name in lists if name is not None)
    return counts.most_common(1)[0][0] if counts else None


def _outermost_list(model: nn.Module, name: str) -> str | None:
    """The name of the outermost `ModuleList` around a layer; None if there is none."""
    parts = name.split(".")
    above = (".".join(parts[:depth]) for depth in range(1, len(parts)))
    return next((each for each in above if isinstance(model.get_submodule(each), nn.ModuleList)), None)


class ParameterCount(NamedTuple):
    """Numbers of parameters; a packed weight counts with its number of unpacked elements."""

    trainable: int
    total: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of `model`; tied ones once."""
    unpacked = {
        id(layer.weight): layer.in_features * layer.out_features for layer in model.modules() if is_quantized(layer)
    }
    sizes = [
        (parameter.requires_grad, unpacked.get(id(parameter), parameter.numel())) for parameter in model.parameters()
    ]
    return ParameterCount(sum(size for trains, size in sizes if trains), sum(size for _, size in sizes))


def rounds_activations(model: nn.Module) -> bool:
    """Whether layers of `model` quantize their inputs too: then no dequantized weight gives exactly their outputs."""
    return any(is_quantized(layer) and layer.quantizer.rounds_activations for layer in model.modules())


@torch.no_grad()
def dequantize_model(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Replace each quantized layer by an ordinary one of `dtype`, in place; returns the same model."""
    for name, layer in list(model.named_modules()):
        if is_quantized(layer):
            model.set_submodule(name, plain_layer(layer, dtype))
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    return model.to(dtype)


def plain_layer(layer: Quantized, dtype: torch.dtype) -> nn.Module:
    """An ordinary layer with the dequantized weight of a quantized one."""
    weight_OI = layer.quantizer.dequantize(layer, dtype)
    out_features, in_features = weight_OI.shape
    with torch.device("meta"):
        plain: nn.Module
        if layer.stored_transposed:
            plain = Conv1D(out_features, in_features)
        else:
            plain = nn.Linear(in_features, out_features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(weight_OI.T if layer.stored_transposed else weight_OI, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return plain

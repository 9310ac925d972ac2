"""The linear layers of a model: finding them, counting parameters, dequantizing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune.quantizers.base import Quantized, is_quantized

LINEAR_TYPES = (nn.Linear, Conv1D)
"""Types of layers with a weight matrix; quantized layers are subclasses."""


LayerKind = Literal["linear", "conv1d", "embedding"]
"""Kinds of layers that adapter methods distinguish: y = W x + b, the same with W stored transposed, and a lookup."""

LINEAR_KINDS: frozenset[LayerKind] = frozenset({"linear", "conv1d"})
"""Kinds of layers that compute W x + b."""


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All layers of a model without adapter that compute W x + b, by name."""
    return {name: layer for name, layer in model.named_modules() if kind_of(layer) in LINEAR_KINDS}


def kind_of(layer: Any) -> LayerKind | None:
    """The kind of a layer; None for every other module, such as a router that is a linear layer and chooses experts."""
    if isinstance(layer, LINEAR_TYPES):
        is_transposed = isinstance(layer, Conv1D) or getattr(layer, "stored_transposed", False)
        is_plain = type(layer) in LINEAR_TYPES or is_quantized(layer) or _maps_vectors(layer)
        return ("conv1d" if is_transposed else "linear") if is_plain else None
    # A scaled embedding (Gemma) has its factor as `embed_scale`; other subclasses look up other rows.
    is_lookup = type(layer) is nn.Embedding or (isinstance(layer, nn.Embedding) and hasattr(layer, "embed_scale"))
    return "embedding" if is_lookup else None


def _maps_vectors(layer: nn.Linear) -> bool:
    """Whether a layer of a subclass maps a vector of `in_features` to one of `out_features`, on the meta device."""
    empty = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in layer.state_dict(keep_vars=True).items()
    }
    vector = torch.empty(1, layer.in_features, dtype=layer.weight.dtype, device="meta")
    try:
        mapped = functional_call(layer, empty, (vector,))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return isinstance(mapped, torch.Tensor) and mapped.shape == (1, layer.out_features)


def stacked_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that hold a matrix for each of several experts, shape (experts, ..., ...), by name.

    transformers 5 keeps the experts of a mixture so; no linear layer computes with them.
    """
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {
        f"{name}.{own}": parameter
        for name, module in model.named_modules()
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and not isinstance(module, convolutions)
    }


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


def modules_with_weight(model: nn.Module, weight: nn.Parameter) -> list[str]:
    """Names of the modules that have this parameter: several if it is tied."""
    named = model.named_parameters(remove_duplicate=False)
    return [name.rpartition(".")[0] for name, parameter in named if parameter is weight]


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

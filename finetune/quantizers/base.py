"""The Quantizer interface. Shape legend: O out_features, I in_features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

ExactExport = Literal["gguf_q4_1"]
"""A foreign file format that holds a quantizer's tensors without further rounding."""


class Capabilities(NamedTuple):
    """Properties of a quantizer's format that other features need.

    Attributes:
        group_size: Contiguous inputs of an output that share scale and zero point; None without such groups.
        float_zero_points: Whether a group's zero point is a float, so that a constant can be added without rounding.
        exact_exports: Foreign formats that hold the stored tensors exactly.
    """

    group_size: int | None = None
    float_zero_points: bool = False
    exact_exports: frozenset[ExactExport] = frozenset()


class Quantizer(ABC):
    """Stores the frozen weight of a linear layer in few bits, and dequantizes it.

    A model is quantized while it loads, one weight at a time: `empty_layer` constructs each layer's replacement without
    data, `quantize` computes its tensors from the checkpoint's weight. Every quantized layer has its quantizer as
    `layer.quantizer`; layers of one model may have different ones.

    Args:
        section: The recipe's section, kept as `section`: the quantizer can be constructed from it again.
    """

    rounds_activations: ClassVar[bool] = False
    """Whether layers quantize their inputs too: then they are not equivalent to a layer with the dequantized weight."""

    bits_per_weight: float
    """Stored bits for each weight, scales included, without values that a tensor has only one of."""

    capabilities: Capabilities = Capabilities()

    def __init__(self, section: Any) -> None:
        self.section = section

    def refuse(self, in_features: int, out_features: int) -> str | None:
        """Why a layer of this shape cannot be quantized; None if it can."""
        return None

    @abstractmethod
    def empty_layer(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> nn.Module:
        """A layer without data that computes in `dtype`; called under the meta device."""

    @abstractmethod
    def quantize(self, layer: nn.Module, weight_OI: Tensor) -> dict[str, Tensor]:
        """The tensors of `layer` for this weight, by name, on the device of `weight_OI`."""

    @abstractmethod
    def dequantize(self, layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantized weight of `layer`, shape (O, I)."""

    @property
    def shifted(self) -> Quantizer:
        """The quantizer of a layer after `shift_minimums`; only with `capabilities.float_zero_points`."""
        raise NotImplementedError

    def shift_minimums(self, layer: nn.Module, constant_OG: Tensor) -> None:
        """Add a constant to the weights of each group, by its minimum alone, which becomes float32.

        Only with `capabilities.float_zero_points`. G are the groups of an output's inputs.
        """
        raise NotImplementedError


class Quantized(nn.Module):
    """The attributes of any quantized layer; a type for type checkers, never instantiated.

    Attributes:
        quantizer: The layer's quantizer.
        in_features: I.
        out_features: O.
        stored_transposed: Whether the checkpoint held the weight as (I, O), as GPT-2 does.
    """

    quantizer: Quantizer
    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: Tensor | None
    stored_transposed: bool


def is_quantized(layer: nn.Module) -> TypeGuard[Quantized]:
    """Whether the layer is quantized."""
    return isinstance(getattr(layer, "quantizer", None), Quantizer)

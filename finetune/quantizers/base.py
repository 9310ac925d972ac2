"""The Quantizer interface. Shape legend: O out_features, I in_features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

ExactExport = Literal["gguf_q4_1"]
"""A container of others that holds a quantizer's tensors without any rounding."""


class Capabilities(NamedTuple):
    """What can be built on a quantizer's way of storing weights.

    Attributes:
        group_size: Contiguous inputs of an output that share scale and zero point; None without such groups.
        float_zero_points: Whether a group's zero point is a float, so that it takes up a constant without rounding.
        exact_exports: Containers that hold the stored tensors as they are.
    """

    group_size: int | None = None
    float_zero_points: bool = False
    exact_exports: frozenset[ExactExport] = frozenset()


class Quantizer(ABC):
    """Stores the frozen weight of a linear layer in few bits and gives it back.

    A model is quantized while it loads, one weight at a time: `empty_layer` builds each layer's replacement without
    data, `quantize` fills it from the checkpoint's tensor. Every layer carries the quantizer that made it as
    `layer.quantizer`; layers of one model may have different ones.

    Args:
        section: The recipe's section, kept as `section`: from it the quantizer can be made again.
    """

    rounds_activations: ClassVar[bool] = False
    """Whether layers round their inputs too, so that they differ from the dequantized weight by more than rounding."""

    bits_per_weight: float
    """Bits that one weight takes as stored, scales included, but for numbers that a tensor has only one of."""

    capabilities: Capabilities = Capabilities()

    def __init__(self, section: Any) -> None:
        self.section = section

    def refuse(self, in_features: int, out_features: int) -> str | None:
        """Why a layer of this shape cannot be quantized, or None."""
        return None

    @abstractmethod
    def empty_layer(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> nn.Module:
        """A layer without data that computes in `dtype`; called under the meta device."""

    @abstractmethod
    def quantize(self, layer: nn.Module, weight_OI: Tensor) -> dict[str, Tensor]:
        """The tensors to put into `layer`, by name, on the device of `weight_OI`."""

    @abstractmethod
    def dequantize(self, layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that `layer` computes with, shape (O, I)."""

    @property
    def shifted(self) -> Quantizer:
        """What stores a layer whose minimums have been shifted; only where `capabilities.float_zero_points`."""
        raise NotImplementedError

    def shift_minimums(self, layer: nn.Module, constant_OG: Tensor) -> None:
        """Add a constant to each group's weights, changing nothing but the minimums, which are float32 from then on.

        Only where `capabilities.float_zero_points`; G are the groups of an output's inputs.
        """
        raise NotImplementedError


class Quantized(nn.Module):
    """What is known of any quantized layer; a type for checkers, never made.

    Attributes:
        quantizer: What made the layer.
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
    """Whether a quantizer made the layer."""
    return isinstance(getattr(layer, "quantizer", None), Quantizer)

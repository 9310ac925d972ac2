"""A linear layer that dequantizes its weight whenever it is needed, and never keeps it.

Shape legend: O out_features, I in_features, `...` any leading dimensions.
"""

from __future__ import annotations

from abc import abstractmethod
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.quantizers.base import Quantizer

WEIGHTS_AT_ONCE = 1 << 18
"""Weights that quantizers process at a time, so that temporary tensors stay small and in the cache."""


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor that a layer stores."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * prod(self.shape)


class PackedQuantizer(Quantizer):
    """A quantizer that is defined by two functions: `pack` (weight -> tensors) and `unpack`.

    ModuLoRA needs no more of a quantizer; `QuantizedLinear` is the layer for all of them.

    Source: Yin et al. 2023, arXiv 2309.16119, section 3.2.
    """

    @abstractmethod
    def tensor_specs(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """The stored tensors of a layer, by name; `weight` are the packed codes, uint8."""

    @abstractmethod
    def pack(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """The tensors of `tensor_specs` for a float32 weight, on its device."""

    @abstractmethod
    def unpack(self, tensors: dict[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """The inverse of `pack`: the dequantized weight, shape (O, I), float32."""

    def empty_layer(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> QuantizedLinear:
        """A `QuantizedLinear`."""
        return QuantizedLinear(self, in_features, out_features, bias, dtype)

    def quantize(self, layer: nn.Module, weight_OI: Tensor) -> dict[str, Tensor]:
        """The packed tensors."""
        tensors = self.pack(weight_OI.detach().float())
        return {"weight": nn.Parameter(tensors.pop("weight"), requires_grad=False), **tensors}

    def dequantize(self, layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        """The unpacked weight, shape (O, I)."""
        assert isinstance(layer, QuantizedLinear)
        return layer.dequantized(dtype)


class QuantizedLinear(nn.Linear):
    """y = W x + b with W in packed form.

    Forward and backward each dequantize W, use it and drop it: one layer's float weight is held at a time.

    Args:
        quantizer: Packs and unpacks the weight.
        in_features: I.
        out_features: O.
        bias: Whether the layer has one.
        dtype: Dtype of the bias.

    Attributes:
        weight: Packed codes, uint8, one dimension; frozen. The quantizer's other tensors are buffers.
        quantizer: As given.
    """

    quantizer: PackedQuantizer

    def __init__(
        self, quantizer: PackedQuantizer, in_features: int, out_features: int, bias: bool, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)  # not `nn.Linear`'s, which would allocate the float weight
        self.in_features, self.out_features = in_features, out_features
        self.quantizer = quantizer
        for name, spec in quantizer.tensor_specs(out_features, in_features).items():
            empty = torch.empty(spec.shape, dtype=spec.dtype)
            if name == "weight":
                self.weight = nn.Parameter(empty, requires_grad=False)
            else:
                self.register_buffer(name, empty)
        self.bias: Any
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False)

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {name: getattr(self, name) for name in self.quantizer.tensor_specs(self.out_features, self.in_features)}

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """W, shape (O, I)."""
        return self.quantizer.unpack(self.packed(), self.out_features, self.in_features).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """The output in the dtype of `input`, or in autocast's; shape (..., I) -> (..., O)."""
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        product: Tensor = _QuantizedMatmul.apply(input.to(dtype), self)
        return product if self.bias is None else product + self.bias.to(dtype)


class _QuantizedMatmul(torch.autograd.Function):
    """x W^T with W dequantized in each direction. Neither W nor x is saved: W is frozen, so dW, which needs x, is not.

    Source: Yin et al. 2023, arXiv 2309.16119, section 3.2, LPLinear.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return functional.linear(x, layer.dequantized(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:  # the first block over frozen embeddings: W need not be dequantized
            return None, None
        return gradients[0] @ ctx.layer.dequantized(ctx.dtype), None

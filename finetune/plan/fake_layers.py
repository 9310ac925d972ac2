"""Fake quantizers: tensors of the true sizes without memory, and no computation."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finetune.plan.tracing import FakeTensors, MemoryTrace
from finetune.quantizers.base import Quantizer
from finetune.quantizers.layer import PackedQuantizer, TensorSpec
from finetune.quantizers.on_load import quantizable_layers, replacement


class FakeQuantizer(PackedQuantizer):
    """Allocates what a quantizer does: a layer's stored tensors, its dequantized weight and the temporaries of that.

    Args:
        quantizer: The quantizer that it replaces.
        kernels_dtype: Dtype of weights that the device's kernels dequantize, without temporaries; None if PyTorch
            operations unpack them in float32.
    """

    def __init__(self, quantizer: Quantizer, kernels_dtype: torch.dtype | None) -> None:
        super().__init__(quantizer.section)
        self.bits_per_weight, self.capabilities = quantizer.bits_per_weight, quantizer.capabilities
        self._quantizer = quantizer
        self._packed = quantizer if isinstance(quantizer, PackedQuantizer) else None
        self._kernels_dtype = kernels_dtype
        self._temporaries: dict[tuple[int, int], int] = {}

    def tensor_specs(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """The quantizer's tensors. A quantizer with layers of another library gets the bytes of its bits per weight."""
        if self._packed is not None:
            return self._packed.tensor_specs(out_features, in_features)
        size = ceil(out_features * in_features * self.bits_per_weight / 8)
        return {"weight": TensorSpec((size,), torch.uint8)}

    def refuse(self, in_features: int, out_features: int) -> str | None:
        """The quantizer's reason to refuse a layer; None if it takes it."""
        return self._quantizer.refuse(in_features, out_features)

    def pack(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """Not supported: there are no weights."""
        raise NotImplementedError

    def unpack(self, tensors: dict[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """A fake weight (O, I), after the allocation of the temporaries."""
        packed, shape = tensors["weight"], (out_features, in_features)
        if self._kernels_dtype is not None:
            return packed.new_empty(shape, dtype=self._kernels_dtype)
        if shape not in self._temporaries:
            self._temporaries[shape] = self._measure(*shape)
        temporaries = packed.new_empty(self._temporaries[shape])  # raises the traced peak
        del temporaries
        return packed.new_empty(shape, dtype=torch.float32)

    def _measure(self, out_features: int, in_features: int) -> int:
        """Peak bytes of unpacking a weight, the weight included."""
        if self._packed is None:
            return 0
        fakes = FakeTensors()
        specs = self.tensor_specs(out_features, in_features).items()
        stored = {name: fakes.like(torch.empty(spec.shape, dtype=spec.dtype, device="meta")) for name, spec in specs}
        # The outer trace must not count this measurement.
        with torch.utils._python_dispatch._disable_current_modes(), MemoryTrace(fakes) as trace:
            self._packed.unpack(stored, out_features, in_features)
        return trace.peak


def quantize_shapes(
    model: PreTrainedModel,
    choose: Callable[[str], Quantizer | None],
    with_head: bool,
    dtype: torch.dtype,
    kernels_dtype: torch.dtype | None,
) -> None:
    """Replace layers that would be quantized with layers of fake quantizers.

    Args:
        model: On the meta device; changed in place.
        choose: Maps a layer's name to its quantizer, or to None for a layer that stays as it is.
        with_head: Whether the output head may be quantized.
        dtype: Compute dtype of the layers.
        kernels_dtype: As for `FakeQuantizer`.

    Raises:
        UnsupportedError: A quantizer does not support a layer.
    """
    fake_quantizers: dict[int, FakeQuantizer] = {}
    layer: Any
    for name, layer in quantizable_layers(model, with_head).items():
        quantizer = choose(name)
        if quantizer is None:
            continue
        fake_quantizer = fake_quantizers.setdefault(id(quantizer), FakeQuantizer(quantizer, kernels_dtype))
        model.set_submodule(name, replacement(name, layer, fake_quantizer, dtype))

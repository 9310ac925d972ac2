"""Codes of 2, 3, 4 or 8 bits with a scale and a float minimum per group: W = scale * code + minimum.

Shape legend: O out_features, I in_features, G groups of an output's inputs, K inputs of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from finetune.quantizers.base import Capabilities
from finetune.quantizers.bits import pack_bits, packed_bytes, unpack_bits
from finetune.quantizers.layer import WEIGHTS_AT_ONCE, PackedQuantizer, QuantizedLinear, TensorSpec
from finetune.recipe.sections.quantization import Groupwise

SCALE_DTYPES = {"float16": torch.float16, "float32": torch.float32}

GGUF_Q4_1_GROUP = 32
"""Weights that share scale and minimum in GGUF's Q4_1 (and a scale in Q8_0)."""


class AffineQuantizer(PackedQuantizer):
    """Asymmetric round-to-nearest quantization: equidistant codes between a group's smallest and largest weight.

    The minimum is a float, so that any constant can be added to a group exactly: QA-LoRA merges into it. Scale and
    minimum are rounded to their stored dtypes before the codes are computed from them, so that codes are the nearest
    ones for the stored values.

    Args:
        section: Bits, group size and the dtypes of scale and minimum.
    """

    def __init__(self, section: Groupwise) -> None:
        super().__init__(section)
        self.bits, self.group_size = section.bits, section.group_size
        self.scale_dtype = SCALE_DTYPES[section.scale_dtype]
        self.minimum_dtype = SCALE_DTYPES[section.minimum_dtype]
        overhead = 8 * (self.scale_dtype.itemsize + self.minimum_dtype.itemsize)
        self.bits_per_weight = self.bits + overhead / self.group_size
        is_q4_1 = (self.bits, self.group_size) == (4, GGUF_Q4_1_GROUP)
        in_halves = self.scale_dtype == self.minimum_dtype == torch.float16
        self.capabilities = Capabilities(
            group_size=self.group_size,
            float_zero_points=True,
            exact_exports=frozenset({"gguf_q4_1"}) if is_q4_1 and in_halves else frozenset(),
        )

    def refuse(self, in_features: int, out_features: int) -> str | None:
        """Groups must divide a row: they do not cross its end."""
        if in_features % self.group_size:
            return f"its {in_features} inputs are no multiple of quantization.group_size: {self.group_size}"
        return None

    def tensor_specs(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Codes, and per group a scale and a minimum."""
        groups = (out_features, in_features // self.group_size)
        return {
            "weight": TensorSpec((packed_bytes(out_features * in_features, self.bits),), torch.uint8),
            "scale": TensorSpec(groups, self.scale_dtype),
            "minimum": TensorSpec(groups, self.minimum_dtype),
        }

    def pack(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """Fit scale and minimum, round them to their stored dtypes, then compute the nearest codes."""
        # A few rows at a time: groups never cross rows, so the codes are the same.
        rows = max(1, WEIGHTS_AT_ONCE // weight_OI.shape[1])
        parts = [self._pack_rows(part_OI) for part_OI in weight_OI.split(rows)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _pack_rows(self, weight_OI: Tensor) -> dict[str, Tensor]:
        groups_OGK = weight_OI.unflatten(1, (-1, self.group_size))
        scale_OG, minimum_OG = self.fit_as_stored(groups_OGK)
        codes_OGK = self.codes(groups_OGK, scale_OG.float(), minimum_OG.float())
        return {"weight": pack_bits(codes_OGK.flatten(), self.bits), "scale": scale_OG, "minimum": minimum_OG}

    def unpack(self, tensors: dict[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """W = scale * code + minimum."""
        codes = unpack_bits(tensors["weight"], self.bits, out_features * in_features)
        codes_OGK = codes.view(out_features, -1, self.group_size).float()
        scale_OG1, minimum_OG1 = (tensors[name].float().unsqueeze(2) for name in ("scale", "minimum"))
        return codes_OGK.mul_(scale_OG1).add_(minimum_OG1).flatten(1)

    @property
    def shifted(self) -> AffineQuantizer:
        """The same quantizer with minimums in float32."""
        return type(self)(self.section.model_copy(update={"minimum_dtype": "float32"}))

    def shift_minimums(self, layer: nn.Module, constant_OG: Tensor) -> None:
        """W + constant = scale * code + (minimum + constant)."""
        assert isinstance(layer, QuantizedLinear)
        layer.minimum = layer.minimum.float() + constant_OG
        layer.quantizer = self.shifted

    def codes(self, groups_OGK: Tensor, scale_OG: Tensor, minimum_OG: Tensor) -> Tensor:
        """The nearest codes, (O, G, K), uint8; zero where the scale is zero."""
        # A group of equal weights has scale 0: its codes are 0, and the minimum alone restores it exactly.
        inverse_OG = torch.where(scale_OG == 0, 0.0, 1 / scale_OG)
        scaled_OGK = (groups_OGK - minimum_OG.unsqueeze(2)).mul_(inverse_OG.unsqueeze(2))
        return scaled_OGK.round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def fit_as_stored(self, groups_OGK: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and minimum of each group, both (O, G), rounded to their stored dtypes."""
        scale_OG, minimum_OG = self.fit(groups_OGK)
        largest = torch.finfo(self.scale_dtype).max  # a scale beyond float16 would be stored as infinity
        return scale_OG.clamp(max=largest).to(self.scale_dtype), minimum_OG.to(self.minimum_dtype)

    def fit(self, groups_OGK: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and minimum of each group, both (O, G), float32: here those that span the group exactly."""
        lowest_OG, highest_OG = groups_OGK.aminmax(dim=2)
        return (highest_OG - lowest_OG) / (2**self.bits - 1), lowest_OG

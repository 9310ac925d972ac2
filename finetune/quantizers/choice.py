"""The choice of a quantizer for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from finetune.quantizers.base import Quantizer
from finetune.quantizers.on_load import OnLoadConfig
from finetune.quantizers.optq import OptqQuantizer
from finetune.recipe.sections.modules import ModuleRule, setting_for
from finetune.recipe.sections.quantization import QuantizationSection
from finetune.resolve import build


class Quantizers:
    """Maps a linear layer's name to its quantizer, by the recipe.

    Args:
        section: The section for layers without a rule of their own.
        modules: Rules for single layers.

    Attributes:
        sections: The distinct sections of all layers, the common one first.
    """

    def __init__(self, section: QuantizationSection, modules: Sequence[ModuleRule] = ()) -> None:
        self.section, self.modules = section, modules
        self.sections = [section]
        for rule in modules:
            if rule.quantization is not None and rule.quantization not in self.sections:
                self.sections.append(rule.quantization)
        self._quantizers: list[Quantizer | None] = [
            build(section) if section.quantizes else None for section in self.sections
        ]

    def __call__(self, layer: str) -> Quantizer | None:
        """The quantizer of a layer; None if it is not quantized."""
        return self._quantizers[self.sections.index(self.section_of(layer))]

    def section_of(self, layer: str) -> QuantizationSection:
        """The recipe's section for a layer."""
        own: QuantizationSection | None = setting_for(self.modules, layer, "quantization")
        return own or self.section

    @property
    def in_use(self) -> list[Quantizer]:
        """Every quantizer that some layer may have."""
        return [quantizer for quantizer in self._quantizers if quantizer is not None]

    @property
    def quantize_nothing(self) -> bool:
        """Whether no layer is quantized."""
        return not self.in_use

    @property
    def calibrated(self) -> list[OptqQuantizer]:
        """Quantizers that need calibration, which runs before a model is loaded for use, not while it loads."""
        return [quantizer for quantizer in self.in_use if isinstance(quantizer, OptqQuantizer)]

    def load_options(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments for `from_pretrained` to quantize while loading; layers compute in `dtype`."""
        assert not self.calibrated, "calibrated layers are loaded from a quantized checkpoint"
        return {} if self.quantize_nothing else {"quantization_config": OnLoadConfig(self, dtype)}

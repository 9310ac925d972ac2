"""QA-LoRA: an update that is constant within each quantization group, so it can be merged into the minimums.

y = W x + (alpha / r) B A g(x), where g sums the inputs of each group that shares a scale and a minimum, A has the shape
(r, groups) and B (out, r). With W = scale * code + minimum, the merged layer has minimum + (alpha / r) B A.

Source: Xu et al. 2024, arXiv 2309.14717, algorithm 1 and section 3.3. The authors' code averages instead of summing,
and divides when it merges: the same up to the scale of A.
"""

from __future__ import annotations

import torch
from torch import nn

from finetune.adapters.lora import LowRankMethod
from finetune.adapters.low_rank import GroupedIecLinear, GroupedLinear, LowRankLinear
from finetune.quantizers.base import Quantized
from finetune.recipe.sections.adapter import QaLora


class QaLoraMethod(LowRankMethod):
    """QA-LoRA over quantized layers whose groups have float minimums."""

    weight_format = (
        "W x + (alpha / r) B A sum(x in each group), with iec both factors after equation 16 of arXiv 2402.05445"
    )
    fits_quantized = True
    section: QaLora

    @property
    def layer(self) -> type[LowRankLinear]:
        """The class of adapted layers."""
        return GroupedIecLinear if self.section.iec else GroupedLinear

    @torch.no_grad()
    def merge_quantized(self, layer: nn.Module) -> nn.Module:
        """Add (alpha / r) B A, (out, groups), to the minimums, which become float32; codes and scales do not change."""
        assert isinstance(layer, LowRankLinear)
        base: Quantized = layer.get_base_layer()
        for adapter in layer.active_adapters:
            # Section 3.3: sum_k (W_k + d) x_k = W x + d g(x) for each group with the constant update d.
            a_RL, b_OR = layer.group_factors(adapter)
            base.quantizer.shift_minimums(base, b_OR @ a_RL * layer.scaling[adapter])
        return base

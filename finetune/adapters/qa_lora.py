"""QA-LoRA: an update that is constant within each group of the quantized base, so that its minimums take it up.

y = W x + (alpha / r) B A pool(x), where pool sums over each group of inputs that share a scale and a minimum, A has the
shape (r, groups) and B (out, r). W = scale * code + minimum, so minimum + (alpha / r) B A is the merged layer.

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
    """QA-LoRA over layers whose groups have float minimums."""

    convention = (
        "W x + (alpha / r) B A sum(x in each group), with iec both factors after equation 16 of arXiv 2402.05445"
    )
    fits_quantized = True
    section: QaLora

    @property
    def layer(self) -> type[LowRankLinear]:
        """The form of the update."""
        return GroupedIecLinear if self.section.iec else GroupedLinear

    @torch.no_grad()
    def merge_quantized(self, layer: nn.Module) -> nn.Module:
        """Add (alpha / r) B A to the minimums, which are float32 from then on; codes and scales stay bit for bit."""
        assert isinstance(layer, LowRankLinear)
        base: Quantized = layer.get_base_layer()
        for adapter in layer.active_adapters:
            a_RL, b_OR = layer.expanded_factors(adapter)
            base.quantizer.shift_minimums(base, b_OR @ a_RL * layer.scaling[adapter])
        return base

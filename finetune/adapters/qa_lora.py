"""QA-LoRA: an update that is constant within each quantization group, so it can be merged into the minimums.

y = W x + (alpha / r) B A g(x), where g sums the inputs of each group that shares a scale and a minimum, A has the shape
(r, groups) and B (out, r). With W = scale * code + minimum, the merged layer has minimum + (alpha / r) B A.

Source: Xu et al. 2024, arXiv 2309.14717, algorithm 1 and section 3.3. The authors' code averages instead of summing,
and divides when it merges: the same up to the scale of A.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from finetune.adapters.lora import LowRankMethod
from finetune.adapters.low_rank import GroupedIecLinear, GroupedLinear, LowRankLinear, has_groups
from finetune.adapters.targets import find_targets
from finetune.models.linear_layers import linear_layers
from finetune.quantizers.base import Quantized
from finetune.recipe.rules.violation import Violation
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

    def violations(self, model: PreTrainedModel) -> Iterator[Violation]:
        """Also layers without groups of inputs: a problem of the quantization, unless it makes groups elsewhere."""
        yield from super().violations(model)
        some_have = any(has_groups(layer) for layer in linear_layers(model).values())
        targets, key = self.section.target_modules, "adapter.target_modules"
        entries = [(targets, key)] if isinstance(targets, str) else [([n], f"{key}.{i}") for i, n in enumerate(targets)]
        for entry, own_key in entries:
            named = self._adapted(find_targets(model, entry, self.kinds).adapted)
            lacking = next((name for name, layer in named.items() if not has_groups(layer)), None)
            what = f"qa_lora merges into the float minimums of groups of inputs, which {lacking} does not have"
            if lacking is not None and not some_have:
                hint = "set it to affine, hqq or optq, or name a model that is quantized so"
                yield Violation("quantization.kind", what, hint)
                return
            if lacking is not None:
                yield Violation(
                    own_key, f"{what}: it is not quantized so", "leave it out, or set adapter.method to lora"
                )

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

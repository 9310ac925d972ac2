"""LoRA: y = W x + (alpha / r) B A x with W frozen, A of shape (r, in), B of shape (out, r) and B = 0 at first.

Source: Hu et al. 2021, arXiv 2106.09685, section 4.1. A starts Kaiming-uniform as in the authors' code.
"""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from finetune.adapters import peft_bridge
from finetune.adapters.base import AdapterMethod
from finetune.adapters.low_rank import layer_class
from finetune.models.linears import LINEAR_TYPES, linear_layers
from finetune.recipe.adapter import LowRank
from finetune.recipe.modules import setting_for


class LoraMethod(AdapterMethod):
    """LoRA over full-precision or quantized layers, with IR-QLoRA's elastic connection if the recipe asks for it."""

    convention = "W x + (alpha / r) B A x, with iec both factors after equation 16 of arXiv 2402.05445"
    section: LowRank
    pooled = False

    def attach(self, model: PreTrainedModel, total_steps: int) -> nn.Module:
        """Add an update of rank r beside each target layer."""
        return peft_bridge.attach(model, self._config(model), self.section.target_modules)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the adapter as stock PEFT reads it; beside it the native tensors where they are others."""
        if self.pooled or self.section.iec:
            peft_bridge.save_as_lora(model, folder)
        else:
            peft_bridge.save(model, folder)

    def load(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        """Put a saved adapter on a base."""
        return peft_bridge.load(model, self._config(model), folder)

    def merge(self, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
        """W + (alpha / r) B A: exact but for the rounding of W's dtype."""
        return peft_bridge.merge(model, self._stock_config(model), folder)

    def _config(self, model: PreTrainedModel) -> LoraConfig:
        config = self._stock_config(model)
        layer = layer_class(pooled=self.pooled, elastic=self.section.iec)
        config._register_custom_module(dict.fromkeys(LINEAR_TYPES, layer))
        return config

    def _stock_config(self, model: PreTrainedModel) -> LoraConfig:
        section = self.section
        targets = section.target_modules
        ranks, alphas, skipped = self._of_single_layers(model)
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=section.r,
            lora_alpha=_short(section.alpha),
            lora_dropout=section.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            rank_pattern=ranks,
            alpha_pattern=alphas,
            exclude_modules=skipped or None,
        )

    def _of_single_layers(self, model: PreTrainedModel) -> tuple[dict[str, int], dict[str, float], list[str]]:
        """Ranks, alphas and left-out layers by name, from the recipe's `modules`."""
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        skipped: list[str] = []
        for name in linear_layers(model):
            own = setting_for(self.modules, name, "adapter")
            if own is None:
                continue
            if own.skip:
                skipped.append(name)
            if own.r:
                ranks[name] = own.r
            if own.alpha:
                alphas[name] = _short(own.alpha)
        return ranks, alphas, skipped


def _short(alpha: float) -> float:
    """Engines that serve adapters declare alpha as an integer."""
    return int(alpha) if alpha.is_integer() else alpha

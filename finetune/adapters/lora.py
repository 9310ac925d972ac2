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
from finetune.quantizers.base import Quantizer
from finetune.recipe.adapter import Lora


class LoraMethod(AdapterMethod):
    """LoRA over full-precision or quantized layers."""

    def __init__(self, section: Lora) -> None:
        self.section = section

    def attach(self, model: PreTrainedModel, quantizer: Quantizer, total_steps: int) -> nn.Module:
        """Add an update of rank r beside each target layer."""
        return peft_bridge.attach(model, self._config(), self.section.target_modules)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the adapter as stock PEFT reads it."""
        peft_bridge.save(model, folder)

    def load(self, model: PreTrainedModel, quantizer: Quantizer, folder: Path) -> nn.Module:
        """Put a saved adapter on a base."""
        return peft_bridge.load(model, self._config(), folder)

    def merge(self, model: nn.Module) -> PreTrainedModel:
        """W + (alpha / r) B A: exact but for the rounding of W's dtype."""
        return peft_bridge.merge(model)

    def _config(self) -> LoraConfig:
        section = self.section
        targets = section.target_modules
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=section.r,
            # Engines that serve adapters declare alpha as an integer.
            lora_alpha=int(section.alpha) if section.alpha.is_integer() else section.alpha,
            lora_dropout=section.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
        )

"""P-tuning: prompt tuning through a prompt encoder, which is discarded after training.

Source: Liu et al. 2021, "GPT Understands, Too", arXiv 2103.10385, section 3.
"""

from __future__ import annotations

from peft import PromptEncoder, PromptEncoderConfig
from torch import nn
from transformers import PreTrainedModel

from finetune.adapters.soft_prompt import EmbeddedPromptMethod
from finetune.adapters.soft_prompt_model import EncodedPrompt
from finetune.recipe.sections.adapter import PTuning


class PTuningMethod(EmbeddedPromptMethod):
    """The prompt is the output of a prompt encoder, an MLP with or without an LSTM, over trainable vectors."""

    section: PTuning

    def _new_prompt(self, model: PreTrainedModel) -> nn.Module:
        return EncodedPrompt(PromptEncoder(self._peft_config(model)), self.section.tokens)

    def _peft_config(self, model: PreTrainedModel) -> PromptEncoderConfig:
        width = self._width(model)
        return PromptEncoderConfig(
            num_virtual_tokens=self.section.tokens,
            token_dim=width,
            num_transformer_submodules=1,
            encoder_reparameterization_type=self.section.encoder.upper(),
            encoder_hidden_size=self.section.hidden_size or width,
        )

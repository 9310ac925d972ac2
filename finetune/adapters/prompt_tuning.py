"""Prompt tuning: P trainable vectors before the embeddings of every row; the base is frozen.

Source: Lester et al. 2021, arXiv 2104.08691. Shape legend: P positions of the prompt, E width of the embeddings.
"""

from __future__ import annotations

from itertools import cycle, islice
from pathlib import Path
from typing import assert_never

import torch
from peft import PeftConfig, PromptTuningConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.adapters.soft_prompt import EmbeddedPromptMethod
from finetune.adapters.soft_prompt_model import FixedPrompt, SoftPromptModel
from finetune.errors import UnsupportedError
from finetune.models.fsdp import unsharded_non_block
from finetune.recipe.sections.adapter import LabelsStart, PromptTuning, TextStart, UniformStart, VocabularyStart


class PromptTuningMethod(EmbeddedPromptMethod):
    """Trains the prompt directly."""

    section: PromptTuning

    @torch.no_grad()
    def load_initial_adapter(self, model: nn.Module, folder: Path) -> None:
        """Start from a saved prompt of the same length."""
        assert isinstance(model, SoftPromptModel)
        model.prompt.embedding.copy_(self._saved_prompt(model.base, folder))

    @torch.no_grad()
    def _new_prompt(self, model: PreTrainedModel) -> nn.Module:
        start = self.section.start
        match start:
            case UniformStart():
                prompt_PE = torch.rand(self.section.tokens, self._width(model)) - 0.5  # the paper's [-0.5, 0.5)
            case VocabularyStart():
                prompt_PE = _embedded(model, self._common_tokens())
            case TextStart():
                prompt_PE = _embedded(model, self._repeated(start.text))
            case LabelsStart():
                labels = torch.stack([_embedded(model, self._tokens(label)).mean(0) for label in start.labels])
                words = _embedded(model, self._common_tokens())
                prompt_PE = torch.cat([labels, words[len(labels) :]])
            case _:
                assert_never(start)
        return FixedPrompt(prompt_PE)

    def _repeated(self, text: str) -> Tensor:
        ids = self._tokens(text).tolist()
        if len(ids) > self.section.tokens:
            raise UnsupportedError(
                f"the initial text has {len(ids)} tokens, and the prompt {self.section.tokens}",
                where="adapter.tokens",
                hint=f"set adapter.tokens to {len(ids)} or more, or shorten the text",
            )
        return torch.tensor(list(islice(cycle(ids), self.section.tokens)))

    def _tokens(self, text: str) -> Tensor:
        assert self.tokenizer is not None
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _peft_config(self, model: PreTrainedModel) -> PeftConfig:
        return PromptTuningConfig(num_virtual_tokens=self.section.tokens, token_dim=self._width(model))


def _embedded(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The embeddings of tokens, (P, E), float32, from the embedding module: it may scale its weight (Gemma)."""
    with unsharded_non_block(model):
        embedded: Tensor = model.get_input_embeddings()(ids.to(model.device))
        return embedded.float().clone()

"""Prefix tuning: P keys and values before every row's own train in every layer, and nothing else.

Source: Li and Liang 2021, arXiv 2101.00190, section 4. The perceptron that makes them (section 4.3) is dropped once
they are trained.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from peft import PrefixEncoder, PrefixTuningConfig
from torch import nn
from transformers import PreTrainedModel

from finetune.adapters.soft_prompt import SoftPromptMethod
from finetune.adapters.soft_prompt_model import EncodedPrompt, FixedPrompt, KeyShape, PrefixedModel, prefix_of_tokens
from finetune.errors import UnsupportedError
from finetune.recipe.sections.adapter import PrefixTuning


class PrefixTuningMethod(SoftPromptMethod):
    """Keys and values train, directly or as what a perceptron makes."""

    convention = "keys and values of P places before each layer's own, in the order layer, key and value, head"
    section: PrefixTuning

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._shapes: WeakKeyDictionary[PreTrainedModel, KeyShape] = WeakKeyDictionary()

    def check_merge(self) -> None:
        """Refuse: a prefix is neither weights nor tokens.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            "a prefix stands among a model's keys and values, and a model's files have no place for it",
            where="adapter.method",
            hint="load the run's adapter/ with PEFT, or train prompt_tuning, which ft export turns into tokens",
        )

    def check_prompt_export(self) -> None:
        """Refuse, for the same reason."""
        self.check_merge()

    def _new_prompt(self, model: PreTrainedModel) -> nn.Module:
        if self.section.projection is None:
            return FixedPrompt(prefix_of_tokens(model, self._common_tokens()))
        return EncodedPrompt(PrefixEncoder(self._peft_config(model)), self.section.tokens)

    def _shape(self, model: PreTrainedModel) -> KeyShape:
        """Found once, by a pass: one process that saves cannot make it alone where each holds a share of the model."""
        if model not in self._shapes:
            self._shapes[model] = KeyShape.of(model)
        return self._shapes[model]

    def _width(self, model: PreTrainedModel) -> int:
        shape = self._shape(model)
        return 2 * shape.layers * shape.heads * shape.width

    def _prompted(self, model: PreTrainedModel, prompt: nn.Module) -> PrefixedModel:
        return PrefixedModel(model, prompt, self._shape(model))

    def _peft_config(self, model: PreTrainedModel) -> PrefixTuningConfig:
        shape = self._shape(model)
        return PrefixTuningConfig(
            num_virtual_tokens=self.section.tokens,
            token_dim=shape.heads * shape.width,
            num_transformer_submodules=1,
            num_attention_heads=shape.heads,
            num_layers=shape.layers,
            prefix_projection=self.section.projection is not None,
            encoder_hidden_size=self.section.projection,
        )

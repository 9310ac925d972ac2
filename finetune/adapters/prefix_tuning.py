"""Prefix tuning: trainable keys and values at P positions before every row, in every layer; the base is frozen.

Source: Li and Liang 2021, arXiv 2101.00190, section 4. The reparameterization by an MLP (section 4.3) is discarded
after training.
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
    """Trains keys and values, directly or through a reparameterization MLP."""

    weight_format = "keys and values of P places before each layer's own, in the order layer, key and value, head"
    section: PrefixTuning

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._shapes: WeakKeyDictionary[PreTrainedModel, KeyShape] = WeakKeyDictionary()

    def check_merge(self) -> None:
        """Refuse: a prefix can be expressed neither by weights nor by tokens.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            "a prefix consists of keys and values, which the files of a model cannot hold",
            where="adapter.method",
            hint="load the run's adapter/ with PEFT, or train prompt_tuning, which ft export can write as tokens",
        )

    def check_prompt_export(self) -> None:
        """Refuse, for the same reason."""
        self.check_merge()

    def _new_prompt(self, model: PreTrainedModel) -> nn.Module:
        if self.section.projection is None:
            return FixedPrompt(prefix_of_tokens(model, self._common_tokens()))
        return EncodedPrompt(PrefixEncoder(self._peft_config(model)), self.section.tokens)

    def _shape(self, model: PreTrainedModel) -> KeyShape:
        """The shape of the model's keys, from one forward pass, cached.

        With a sharded model the pass needs all ranks, but only one of them saves the prompt and asks again.
        """
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

"""Base of the soft prompt methods: saving in PEFT's format, and export of prompts as vocabulary tokens.

Shape legend: P positions of the prompt, E width of the embeddings, W values of a position.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.adapters import peft_bridge
from finetune.adapters.base import AdapterMethod, PromptTokens
from finetune.adapters.soft_prompt_model import EmbeddedPromptModel, FixedPrompt, SoftPromptModel
from finetune.errors import UnsupportedError
from finetune.recipe.sections.adapter import SoftPrompt

COMMON_TOKENS = 5000
"""Tokens from which initial prompts are sampled. Source: Lester et al. 2021, arXiv 2104.08691, section 2.1."""


class SoftPromptMethod(AdapterMethod):
    """A trainable prompt before a frozen model."""

    section: SoftPrompt

    def attach(self, model: PreTrainedModel, total_steps: int) -> nn.Module:
        """Put a new prompt before `model`."""
        return self._prompted(model, self._new_prompt(model))

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the prompt as stock PEFT reads it; a prompt encoder is not saved."""
        assert isinstance(model, SoftPromptModel)
        with torch.no_grad():
            config = self._peft_config(model.base)
            config.task_type, config.base_model_name_or_path = "CAUSAL_LM", model.base.name_or_path
            peft_bridge.save_prompt(model.prompt(), config, folder)

    def load(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        """Put a saved prompt before a base."""
        return self._prompted(model, FixedPrompt(self._saved_prompt(model, folder))).requires_grad_(False)

    def detach(self, model: nn.Module) -> PreTrainedModel:
        """The base without the prompt."""
        assert isinstance(model, SoftPromptModel)
        return model.base

    def mergeable(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        """Refuse: see `check_merge`."""
        self.check_merge()
        raise NotImplementedError

    @abstractmethod
    def check_merge(self) -> None:
        """Refuse, with a hint at the alternative."""

    @abstractmethod
    def _new_prompt(self, model: PreTrainedModel) -> nn.Module:
        """The module with the trainable parameters; its output is the prompt, (P, W)."""

    @abstractmethod
    def _width(self, model: PreTrainedModel) -> int:
        """W, the values of a position."""

    @abstractmethod
    def _prompted(self, model: PreTrainedModel, prompt: nn.Module) -> SoftPromptModel:
        """The model with the prompt before its rows."""

    @abstractmethod
    def _peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """PEFT's configuration of the prompt."""

    def _saved_prompt(self, model: PreTrainedModel, folder: Path) -> Tensor:
        return peft_bridge.load_prompt(folder, (self.section.tokens, self._width(model)))

    def _common_tokens(self) -> Tensor:
        """P random common tokens, int64; without replacement if there are enough."""
        pool = common_tokens(self.tokenizer)
        enough = len(pool) >= self.section.tokens
        chosen = torch.randperm(len(pool)) if enough else torch.randint(len(pool), (self.section.tokens,))
        return pool[chosen[: self.section.tokens]]


class EmbeddedPromptMethod(SoftPromptMethod):
    """A prompt of embeddings, which can be exported as tokens of the model."""

    weight_format = "the model reads [P; X] after arXiv 2104.08691, P in the place of embeddings, behind any padding"

    def check_merge(self) -> None:
        """Refuse: a prompt is input of the model, not part of its weights.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            f"a prompt of {self.section.method} is input of the model and cannot be merged into its weights",
            where="adapter.method",
            hint="ft export writes a model with the prompt as tokens of its vocabulary",
        )

    def check_prompt_export(self) -> None:
        """Accept: the prompt can be exported."""
        return None

    @torch.no_grad()
    def export_prompt(
        self, model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase, unlikely: int
    ) -> PromptTokens:
        """Add a token for each vector of the prompt, and prepend them to the chat template.

        Input and output embeddings are untied: the model must read these tokens, but never generate them. Their output
        rows copy that of an unlikely token, because zero rows would win where all other logits are negative. The
        generation config suppresses them too, for engines that follow it.

        Raises:
            UnsupportedError: The model already has tokens of these names.
        """
        prompt_PE = self._saved_prompt(model, folder)
        names = [f"<|soft_prompt_{place}|>" for place in range(len(prompt_PE))]
        new = [AddedToken(name, special=True, normalized=False) for name in names]
        if tokenizer.add_tokens(new, special_tokens=True) != len(names):
            raise UnsupportedError(
                f"the tokenizer already has tokens such as {names[0]}",
                where="model.name",
                hint="train on the model that was not exported with a prompt",
            )
        ids = tokenizer.convert_tokens_to_ids(names)
        _untie(model)
        model.resize_token_embeddings(
            max(len(tokenizer), model.get_input_embeddings().num_embeddings), mean_resizing=False
        )
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        # Gemma multiplies embeddings by this factor after the lookup; the prompt was trained behind it.
        scale = float(getattr(inputs, "embed_scale", 1.0))
        ids_P = torch.tensor(ids).to(inputs.weight.device)
        # The prompt is read onto the CPU; the model may be on a GPU.
        inputs.weight.index_copy_(0, ids_P, (prompt_PE / scale).to(inputs.weight))
        for parameter in outputs.parameters():
            parameter.index_copy_(0, ids_P, parameter[unlikely].clone().expand(len(ids), *parameter.shape[1:]))
        model.generation_config.suppress_tokens = [*(model.generation_config.suppress_tokens or []), *ids]
        text = "".join(names)
        if tokenizer.chat_template is not None:
            tokenizer.chat_template = _with_prefix(tokenizer.chat_template, text)
        return PromptTokens(model, ids, text)

    def _width(self, model: PreTrainedModel) -> int:
        width: int = model.get_input_embeddings().embedding_dim
        return width

    def _prompted(self, model: PreTrainedModel, prompt: nn.Module) -> SoftPromptModel:
        return EmbeddedPromptModel(model, prompt)


def common_tokens(tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """The first COMMON_TOKENS tokens of the vocabulary that are text: not special, blank, or part of a character.

    Tokenizers number tokens by frequency in their training text, by merges or by likelihood. The paper uses the order
    of T5's vocabulary in the same way.
    """
    assert tokenizer is not None
    added = set(tokenizer.added_tokens_decoder)
    found: list[int] = []
    for token in sorted(set(tokenizer.get_vocab().values()) - added):
        if _is_text(tokenizer.decode([token])):
            found.append(token)
        if len(found) == COMMON_TOKENS:
            break
    return torch.tensor(found)


def _is_text(text: str) -> bool:
    return bool(text.strip()) and "\N{REPLACEMENT CHARACTER}" not in text


def _untie(model: PreTrainedModel) -> None:
    """Give the output head its own copy of the weight."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False


def _with_prefix(template: Any, text: str) -> Any:
    """A chat template, or several by name, with `text` prepended to every rendering."""
    if isinstance(template, dict):
        return {name: _with_prefix(one, text) for name, one in template.items()}
    return text + template

"""Trainable rows of single tokens: in the embeddings and, where they are not tied to it, in the output head.

Shape legend: N tokens with a trainable row, E width of the hidden states, V vocabulary, `...` any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from finetune.models.linear_layers import modules_with_weight
from finetune.quantizers.base import is_quantized


class HeadRows(TrainableTokensLayer):
    """Trained rows of an output head.

    PEFT's own layer copies the whole head in each pass and drops its bias. Here the trained rows give their logits
    alone, which replace those of the base.
    """

    def forward_adapters(self, x: Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Logits, (..., E) -> (..., V)."""
        if self.disable_adapters or self.merged:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        head = self.base_layer
        logits: Tensor = head(x, *args, **kwargs)
        for adapter in active_adapters:
            ids_N = torch.tensor(self.token_indices[adapter], device=logits.device)
            rows_NE = self.trainable_tokens_delta[adapter].to(x.dtype)
            bias_N = None if head.bias is None else head.bias[ids_N].to(x.dtype)
            logits = logits.index_copy(-1, ids_N, functional.linear(x, rows_NE, bias_N).to(logits.dtype))
        return logits


def token_modules(model: PreTrainedModel, adapted: Collection[str] = ()) -> list[str]:
    """Names of the modules with rows of tokens: the embeddings, and the head if it has a weight of its own.

    Args:
        model: The base.
        adapted: Names of layers that are adapted: the rows of such a head change through its update.
    """
    embeddings = model.get_input_embeddings().weight
    tied = modules_with_weight(model, embeddings)
    head = own_head(model)
    return tied[:1] if head is None or head in adapted else [tied[0], head]


def own_head(model: PreTrainedModel) -> str | None:
    """The name of the output head; None if it is tied to the embeddings, or there is none."""
    head = model.get_output_embeddings()
    if head is None or head.weight is model.get_input_embeddings().weight:
        return None
    return next(name for name, module in model.named_modules() if module is head)


def has_quantized_head(model: PreTrainedModel) -> bool:
    """Whether the rows of the output head are quantized, so that they cannot train."""
    return is_quantized(model.get_output_embeddings())


def use_head_rows(model: nn.Module) -> None:
    """Let the trained rows of output heads compute as `HeadRows`, but for tied ones, which PEFT computes right."""
    for module in model.modules():
        is_head = isinstance(module, TrainableTokensLayer) and isinstance(module.base_layer, nn.Linear)
        if is_head and (module.tied_adapter is None or module.base_layer.bias is not None):
            module.__class__ = HeadRows  # type: ignore[assignment]


def merged_ids(ids: Sequence[int], new: Sequence[int]) -> list[int]:
    """Ids of named and of new tokens, each once."""
    return list(dict.fromkeys([*ids, *new]))

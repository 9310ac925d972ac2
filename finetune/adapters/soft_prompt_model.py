"""A frozen model that reads a trained prompt before every row, as embeddings or as keys and values.

Shape legend: B rows, T tokens of the rows, P places of the prompt, E width of the embeddings, W numbers of a place,
L layers, H key heads, D width of a key.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel

from finetune.errors import UnsupportedError
from finetune.models.fsdp import unshard_non_block


class FixedPrompt(nn.Module):
    """A prompt that trains as it is.

    Args:
        prompt_PW: What it starts as, float32.
    """

    def __init__(self, prompt_PW: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Parameter(prompt_PW)

    def forward(self) -> Tensor:
        """The prompt, shape (P, W)."""
        return self.embedding


class EncodedPrompt(nn.Module):
    """A prompt that a network makes of vectors of its own.

    Args:
        encoder: From the numbers of the places, shape (1, P), to the prompt, shape (1, P, W).
        places: P.
    """

    def __init__(self, encoder: nn.Module, places: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.places = places

    def forward(self) -> Tensor:
        """The prompt, shape (P, W); in float32 whatever the rest computes in, so that it can be saved as it was."""
        device = next(self.encoder.parameters()).device
        with torch.autocast(device.type, enabled=False):
            prompt_PW: Tensor = self.encoder(torch.arange(self.places, device=device)[None])[0]
        return prompt_PW


class SoftPromptModel(nn.Module, ABC):
    """A causal language model with a prompt before every row; called as the model itself, and answers as it does.

    Args:
        base: The model; it is frozen.
        prompt: Called without arguments, the prompt of shape (P, W), float32.
    """

    def __init__(self, base: PreTrainedModel, prompt: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.prompt = prompt.to(base.device)

    def get_input_embeddings(self) -> nn.Module:
        """The base's."""
        embeddings: nn.Module = self.base.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> nn.Module:
        """The base's."""
        head: nn.Module = self.base.get_output_embeddings()
        return head

    @property
    def config(self) -> PreTrainedConfig:
        """The model's."""
        return self.base.config

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The model's."""
        return self.base.generation_config

    @abstractmethod
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> Any:
        """The model's output for rows of shape (B, T), padded on either side.

        The prompt has no logits: there are as many as without it, and `logits_to_keep` counts as without it.
        """

    @abstractmethod
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """The rows, shape (B, T), and what follows them, as the model's own `generate` gives them.

        Where that wants a token for each place of the prompt, it gets the row's first one, so that a penalty for
        repeating counts the tokens that it counts without a prompt.
        """


class EmbeddedPromptModel(SoftPromptModel):
    """The prompt is P more embeddings between a row's padding and its first token (W = E).

    Source: Lester et al. 2021, arXiv 2104.08691, section 2: Pr(Y | [P; X]).
    """

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> Any:
        """See the base class."""
        assert position_ids is None, "recipes with soft prompts pad their rows"
        rows = self._rows(input_ids, _mask(input_ids, attention_mask))
        added = rows.ids.shape[1] - input_ids.shape[1]
        # A row's token in column t now stands in column t + P, with padding before it or without.
        keep = logits_to_keep + added if isinstance(logits_to_keep, Tensor) else logits_to_keep or input_ids.shape[1]
        return self.base(
            inputs_embeds=rows.embeddings,
            attention_mask=rows.mask,
            position_ids=_positions(rows.mask),
            logits_to_keep=keep,
            **options,
        )

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """See the base class."""
        return _generated(self.base, input_ids, self._rows(input_ids, attention_mask), **options)

    def _rows(self, ids_BT: Tensor, mask_BT: Tensor) -> _Rows:
        prompt_PE = self.prompt()
        rows, places = len(ids_BT), len(prompt_PE)
        prompts = _Prompts(prompt_PE.expand(rows, -1, -1), mask_BT.new_ones(rows, places))
        return _prompted(self.base, prompts, ids_BT, mask_BT)


class PromptChoiceModel(nn.Module):
    """A model with several prompts of embeddings, of which each row names the one that stands before it.

    Source: Lester et al. 2021, arXiv 2104.08691, figure 2: rows of different tasks go through one model in one batch.

    Args:
        models: One for each prompt, all with the same base.
    """

    def __init__(self, models: Sequence[EmbeddedPromptModel]) -> None:
        super().__init__()
        self.base = models[0].base
        self.prompts = nn.ModuleList(model.prompt for model in models)

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The model's."""
        return self.base.generation_config

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, prompt_of_row: Sequence[int], **options: Any
    ) -> Tensor:
        """As `SoftPromptModel.generate`, each row behind the prompt of the number that stands for it."""
        chosen = [self.prompts[number]() for number in prompt_of_row]
        longest = max(map(len, chosen))
        prompts = _Prompts(
            torch.stack([pad(prompt_PE, (0, 0, longest - len(prompt_PE), 0)) for prompt_PE in chosen]),
            torch.stack([pad(attention_mask.new_ones(len(each)), (longest - len(each), 0)) for each in chosen]),
        )
        rows = _prompted(self.base, prompts, input_ids, attention_mask)
        return _generated(self.base, input_ids, rows, **options)


class PrefixedModel(SoftPromptModel):
    """The prompt is P keys and values before each row's own in every layer (W = 2 L H D).

    A place holds, layer by layer, its key and then its value, head by head: the layout of PEFT's files.

    Source: Li and Liang 2021, arXiv 2101.00190, section 4.2.

    Args:
        base: The model.
        prompt: The prefix.
        shape: Of the model's keys and values.
    """

    def __init__(self, base: PreTrainedModel, prompt: nn.Module, shape: KeyShape) -> None:
        super().__init__(base, prompt)
        self.shape = shape

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> Any:
        """See the base class."""
        assert position_ids is None, "recipes with soft prompts pad their rows"
        prefix_PW = self.prompt()
        mask = _prefixed(_mask(input_ids, attention_mask), 1, len(prefix_PW))
        return self.base(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=_positions(mask)[:, len(prefix_PW) :],
            past_key_values=self._cache(prefix_PW, len(input_ids)),
            logits_to_keep=logits_to_keep,
            **options,
        )

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """See the base class."""
        prefix_PW = self.prompt()
        places = len(prefix_PW)
        written = self.base.generate(
            input_ids=_prefixed(input_ids, input_ids.gather(1, _first_column(attention_mask)), places),
            attention_mask=_prefixed(attention_mask, 1, places),
            past_key_values=self._cache(prefix_PW, len(input_ids)),
            **options,
        )
        return written[:, places:]

    def _cache(self, prefix_PW: Tensor, rows: int) -> DynamicCache:
        """The prefix as a model's cache holds what it has read, for each of `rows`."""
        layers, heads, width = self.shape
        device = prefix_PW.device.type
        computes_in = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.base.dtype
        prefix_LPHD = prefix_PW.to(computes_in).view(-1, 2 * layers, heads, width).transpose(0, 1)
        keys_and_values = prefix_LPHD.transpose(1, 2)[:, None].expand(-1, rows, -1, -1, -1)
        return DynamicCache(
            [(keys_and_values[2 * layer], keys_and_values[2 * layer + 1]) for layer in range(layers)],
            config=self.base.config,
        )


class KeyShape(NamedTuple):
    """Layers, key heads, and width of a key, of a model whose layers all have the same."""

    layers: int
    heads: int
    width: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> KeyShape:
        """The shape of `model`, seen from what it keeps of one token.

        Raises:
            UnsupportedError: Its layers differ, or do not all keep keys and values.
        """
        keys, values = _kept(model, torch.zeros(1, 1, dtype=torch.long, device=model.device))
        shapes = {tensor.shape for tensor in (*keys, *values)}
        if len(shapes) != 1:
            raise UnsupportedError(
                f"the layers of this model ({model.config.model_type}) do not all keep keys and values of one shape",
                where="adapter.method",
                hint="set it to prompt_tuning",
            )
        _, heads, _, width = shapes.pop()
        return cls(len(keys), heads, width)


@torch.no_grad()
def prefix_of_tokens(model: PreTrainedModel, ids_P: Tensor) -> Tensor:
    """The prefix that does what reading these tokens does, shape (P, 2 L H D), float32.

    Source: Li and Liang 2021, arXiv 2101.00190, section 7.4: a prefix starts best as the activations of words.
    """
    keys, values = _kept(model, ids_P[None].to(model.device))
    pairs_LHPD = torch.stack([tensor[0].float() for pair in zip(keys, values, strict=True) for tensor in pair])
    return pairs_LHPD.permute(2, 0, 1, 3).flatten(1)


class _Prompts(NamedTuple):
    """A prompt for each row, shape (B, P, E); shorter ones are padded on the left, and the mask (B, P) says so."""

    embeddings_BPE: Tensor
    mask_BP: Tensor


class _Rows(NamedTuple):
    """Rows with their prompt: ids and mask of shape (B, P + T), embeddings (B, P + T, E)."""

    ids: Tensor
    embeddings: Tensor
    mask: Tensor


@torch.no_grad()
def _kept(model: PreTrainedModel, ids_BT: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values that each layer keeps of these rows, shapes (B, H, T, D)."""
    cache = model.eval()(input_ids=ids_BT, use_cache=True).past_key_values
    return [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]


def _prompted(base: PreTrainedModel, prompts: _Prompts, ids_BT: Tensor, mask_BT: Tensor) -> _Rows:
    """Each row with its prompt before its first token, behind the padding on its left.

    Were the padding between prompt and row, sliding windows and biases by distance would count it.
    """
    unshard_non_block(base)
    embeddings_BTE = base.get_input_embeddings()(ids_BT)
    places = prompts.mask_BP.shape[1]
    begin_B1 = _first_column(mask_BT)
    column = torch.arange(places + ids_BT.shape[1], device=ids_BT.device)
    # Of prompt and row, one behind the other, the column that comes to stand in each column.
    source = torch.where(column < begin_B1 + places, column - begin_B1, column)
    source = torch.where(column < begin_B1, column + places, source)
    embeddings = torch.cat([prompts.embeddings_BPE.to(embeddings_BTE.dtype), embeddings_BTE], dim=1)
    fillers_BP = ids_BT.gather(1, begin_B1).expand(-1, places)
    return _Rows(
        ids=torch.cat([fillers_BP, ids_BT], dim=1).gather(1, source),
        embeddings=embeddings.gather(1, source[..., None].expand_as(embeddings)),
        mask=torch.cat([prompts.mask_BP, mask_BT], dim=1).gather(1, source),
    )


def _generated(base: PreTrainedModel, ids_BT: Tensor, rows: _Rows, **options: Any) -> Tensor:
    """The rows without their prompts, and what follows them."""
    written = base.generate(input_ids=rows.ids, inputs_embeds=rows.embeddings, attention_mask=rows.mask, **options)
    return torch.cat([ids_BT, written[:, rows.ids.shape[1] :]], dim=1)


def _mask(ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    return torch.ones_like(ids_BT) if mask_BT is None else mask_BT


def _first_column(mask_BT: Tensor) -> Tensor:
    """The column of each row's first token, shape (B, 1)."""
    return mask_BT.argmax(dim=1, keepdim=True)


def _positions(mask_BT: Tensor) -> Tensor:
    """Each token's place in its row, padding not counted."""
    return (mask_BT.cumsum(dim=1) - 1).clamp(min=0)


def _prefixed(rows_BT: Tensor, value: Tensor | int, places: int) -> Tensor:
    """Rows of integers with `value`, of each row or of all, in so many places before them."""
    before_BP = rows_BT.new_zeros(len(rows_BT), places) + value
    return torch.cat([before_BP, rows_BT], dim=1)

"""A frozen model with a trained prompt before every row, as embeddings or as keys and values.

Shape legend: B rows, T tokens of the rows, P positions of the prompt, E width of the embeddings, W values of a
position, L layers, H key heads, D width of a key.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel

from finetune.errors import UnsupportedError
from finetune.models.fsdp import unshard_non_block
from finetune.models.kernels.float32_compute import computes_in
from finetune.models.kernels.length_rotation import length_rotation


class FixedPrompt(nn.Module):
    """A prompt that is itself the trainable parameter.

    Args:
        prompt_PW: Initial value, float32.
    """

    def __init__(self, prompt_PW: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Parameter(prompt_PW)

    def forward(self) -> Tensor:
        """The prompt, shape (P, W)."""
        return self.embedding


class EncodedPrompt(nn.Module):
    """A prompt that is the output of a prompt encoder (p-tuning) or reparameterization MLP (prefix tuning).

    Args:
        encoder: Maps position indices, shape (1, P), to the prompt, shape (1, P, W).
        places: P.
    """

    def __init__(self, encoder: nn.Module, places: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.places = places

    def forward(self) -> Tensor:
        """The prompt, shape (P, W); always in float32, so that the saved prompt equals the one used in training."""
        device = next(self.encoder.parameters()).device
        with torch.autocast(device.type, enabled=False):
            prompt_PW: Tensor = self.encoder(torch.arange(self.places, device=device)[None])[0]
        return prompt_PW


class SoftPromptModel(nn.Module, ABC):
    """A causal language model with a prompt before every row, with the interface of the model itself.

    Args:
        base: The model; it is frozen here.
        prompt: A module whose output, without arguments, is the prompt of shape (P, W), float32.
    """

    def __init__(self, base: PreTrainedModel, prompt: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.prompt = prompt.to(base.device)

    def get_input_embeddings(self) -> nn.Module:
        """The base's embeddings or output head."""
        embeddings: nn.Module = self.base.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> nn.Module:
        """The base's embeddings or output head."""
        head: nn.Module = self.base.get_output_embeddings()
        return head

    @property
    @torch.no_grad()
    def prompt_tokens(self) -> int:
        """P."""
        return len(self.prompt())

    @property
    def config(self) -> PreTrainedConfig:
        """The base's configuration."""
        return self.base.config

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The base's generation config."""
        return self.base.generation_config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> Any:
        """The base's output for rows of shape (B, T), padded on either side.

        Positions of the prompt have no logits: their number, and the meaning of `logits_to_keep`, is the same as
        without a prompt.
        """
        assert position_ids is None, "recipes with soft prompts pad their rows"
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.base(**self._inputs(input_ids, mask_BT, logits_to_keep), **options)

    @abstractmethod
    def _inputs(self, ids_BT: Tensor, mask_BT: Tensor, logits_to_keep: int | Tensor) -> dict[str, Any]:
        """The arguments of the base's forward pass for rows with the prompt."""

    @abstractmethod
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """The rows, shape (B, T), with the generated tokens appended, as from the base's own `generate`.

        That needs a token id for each position of the prompt. It gets the row's first token, so that a repetition
        penalty counts the same set of tokens as without a prompt.
        """


class EmbeddedPromptModel(SoftPromptModel):
    """The prompt is P embeddings between a row's left padding and its first token (W = E).

    Source: Lester et al. 2021, arXiv 2104.08691, section 2: Pr(Y | [P; X]).
    """

    def _inputs(self, ids_BT: Tensor, mask_BT: Tensor, logits_to_keep: int | Tensor) -> dict[str, Any]:
        rows = self._rows(ids_BT, mask_BT)
        added = rows.ids.shape[1] - ids_BT.shape[1]
        # A token of column t is now in column t + P, whether padding is on its left or right. 0 keeps all
        # logits: those of the row, not those of the prompt.
        keep = logits_to_keep + added if isinstance(logits_to_keep, Tensor) else logits_to_keep or ids_BT.shape[1]
        return {
            "inputs_embeds": rows.embeddings,
            "attention_mask": rows.mask,
            "position_ids": _positions(rows.mask),
            "logits_to_keep": keep,
        }

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """See the base class."""
        _refuse_other_rotation(self, input_ids, options, keeps_prompt=True)
        return _generated(self.base, input_ids, self._rows(input_ids, attention_mask), **options)

    def _rows(self, ids_BT: Tensor, mask_BT: Tensor) -> _Rows:
        prompt_PE = self.prompt()
        rows, places = len(ids_BT), len(prompt_PE)
        prompts = _Prompts(prompt_PE.expand(rows, -1, -1), mask_BT.new_ones(rows, places))
        return _prompted(self.base, prompts, ids_BT, mask_BT)


class PromptChoiceModel(nn.Module):
    """A model with several prompts, one of which is chosen for each row of a batch.

    Source: Lester et al. 2021, arXiv 2104.08691, figure 2: rows of different tasks in one batch of one model.

    Args:
        models: One for each prompt, all with the same base.
    """

    def __init__(self, models: Sequence[EmbeddedPromptModel]) -> None:
        super().__init__()
        self.base = models[0].base
        self.prompts = nn.ModuleList(model.prompt for model in models)

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The base's generation config."""
        return self.base.generation_config

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, prompt_of_row: Sequence[int], **options: Any
    ) -> Tensor:
        """As `SoftPromptModel.generate`; `prompt_of_row` holds the index of each row's prompt."""
        chosen = [self.prompts[number]() for number in prompt_of_row]
        longest = max(map(len, chosen))
        prompts = _Prompts(
            torch.stack([pad(prompt_PE, (0, 0, longest - len(prompt_PE), 0)) for prompt_PE in chosen]),
            torch.stack([pad(attention_mask.new_ones(len(each)), (longest - len(each), 0)) for each in chosen]),
        )
        rows = _prompted(self.base, prompts, input_ids, attention_mask)
        return _generated(self.base, input_ids, rows, **options)


class PrefixedModel(SoftPromptModel):
    """The prompt is P keys and values before those of the row, in every layer (W = 2 L H D).

    The values of a position are ordered by layer, then key before value, then head: the layout of PEFT's files.

    Source: Li and Liang 2021, arXiv 2101.00190, section 4.2.

    Args:
        base: The model.
        prompt: The prefix.
        shape: Shape of the model's keys and values.
    """

    def __init__(self, base: PreTrainedModel, prompt: nn.Module, shape: KeyShape) -> None:
        super().__init__(base, prompt)
        self.shape = shape
        self._counts_any_padding: bool | None = None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> Any:
        """See the base class. Padding is moved to the right of each row: windows would count it after the prefix."""
        if attention_mask is None or not bool(_first_column(attention_mask).any()):
            return super().forward(input_ids, attention_mask, position_ids, logits_to_keep, **options)
        begin_B1, columns_T = _first_column(attention_mask), torch.arange(input_ids.shape[1], device=input_ids.device)
        moved_BT = (columns_T + begin_B1) % len(columns_T)
        output = super().forward(
            input_ids.gather(1, moved_BT), attention_mask.gather(1, moved_BT), position_ids, 0, **options
        )
        keep = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
        back_BK = ((columns_T - begin_B1) % len(columns_T))[:, keep, None]
        output.logits = output.logits.gather(1, back_BK.expand(-1, -1, output.logits.shape[-1]))
        return output

    def _inputs(self, ids_BT: Tensor, mask_BT: Tensor, logits_to_keep: int | Tensor) -> dict[str, Any]:
        prefix_PW = self.prompt()
        mask = _prefixed(mask_BT, 1, len(prefix_PW))
        return {
            "input_ids": ids_BT,
            "attention_mask": mask,
            "position_ids": _positions(mask)[:, len(prefix_PW) :],
            "past_key_values": self._cache(prefix_PW, len(ids_BT)),
            "logits_to_keep": logits_to_keep,
        }

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """See the base class. Rows of different lengths are separate batches where the model counts their padding."""
        _refuse_other_rotation(self, input_ids, options, keeps_prompt=False)
        begins_B = _first_column(attention_mask).squeeze(1)
        lengths = begins_B.unique().tolist()
        tokens = input_ids.shape[1] + options.get("max_new_tokens", input_ids.shape[1])
        if len(lengths) == 1 or not self._counts_padding(tokens):
            return self._continued(input_ids, attention_mask, **options)
        new: dict[int, Tensor] = {}
        for begin in lengths:
            rows = (begins_B == begin).nonzero().squeeze(1)
            written = self._continued(
                input_ids[rows, begin:],
                attention_mask[rows, begin:],
                # Each of them may count the tokens that it has seen.
                **{**options, "stopping_criteria": [copy(each) for each in options.get("stopping_criteria") or ()]},
            )
            new |= dict(zip(rows.tolist(), written[:, input_ids.shape[1] - begin :], strict=True))
        filler = options.get("pad_token_id") or 0
        ends_BN = pad_sequence([new[row] for row in range(len(input_ids))], batch_first=True, padding_value=filler)
        return torch.cat([input_ids, ends_BN], dim=1)

    def _continued(self, ids_BT: Tensor, mask_BT: Tensor, **options: Any) -> Tensor:
        """As `generate`, for rows whose padding between prefix and first token does not matter."""
        prefix_PW = self.prompt()
        places = len(prefix_PW)
        written = self.base.generate(
            input_ids=_prefixed(ids_BT, ids_BT.gather(1, _first_column(mask_BT)), places),
            attention_mask=_prefixed(mask_BT, 1, places),
            past_key_values=self._cache(prefix_PW, len(ids_BT)),
            **options,
        )
        return written[:, places:]

    def _counts_padding(self, tokens: int) -> bool:
        """Whether padding between prefix and row changes what the model computes for rows of this many tokens.

        Sliding windows count it once they are shorter than prefix and row. Other distances by column, such as ALiBi's
        in MPT, show on a few tokens.
        """
        prefix_PW = self.prompt()
        windows = [layer.get_max_length() for layer in self._cache(prefix_PW, 1).layers if layer.is_sliding]
        if windows and min(windows) < len(prefix_PW) + tokens:
            return True
        if self._counts_any_padding is None:
            few_BT = torch.arange(4, device=self.base.device)[None]
            mask_BT = torch.ones_like(few_BT)
            alone, moved = (
                self.base(**self._inputs(pad(few_BT, (gap, 0)), pad(mask_BT, (gap, 0)), 0)).logits[:, -4:]
                for gap in (0, 32)
            )
            tolerance = max(1e-4, 8 * torch.finfo(alone.dtype).eps) * alone.float().norm()
            self._counts_any_padding = not bool((alone - moved).float().norm() <= tolerance)
        return self._counts_any_padding

    def _cache(self, prefix_PW: Tensor, rows: int) -> DynamicCache:
        """The prefix as a key-value cache, expanded to `rows` rows."""
        layers, heads, width = self.shape
        device = prefix_PW.device.type
        # Attention concatenates cached and new keys, so the prefix needs the dtype in which the model computes.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else computes_in(self.base)
        prefix_LPHD = prefix_PW.to(dtype).view(-1, 2 * layers, heads, width).transpose(0, 1)
        keys_and_values = prefix_LPHD.transpose(1, 2)[:, None].expand(-1, rows, -1, -1, -1)
        # The configuration tells the cache which layers have a sliding window.
        return DynamicCache(
            [(keys_and_values[2 * layer], keys_and_values[2 * layer + 1]) for layer in range(layers)],
            config=self.base.config,
        )


class KeyShape(NamedTuple):
    """Number of layers, key heads and width of a key, of a model with uniform layers."""

    layers: int
    heads: int
    width: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> KeyShape:
        """The shape of `model`, from its key-value cache of one token.

        Raises:
            UnsupportedError: Its layers differ, or not all of them cache keys and values.
        """
        keys, values = _cached(model, torch.zeros(1, 1, dtype=torch.long, device=model.device))
        shapes = {tensor.shape for tensor in (*keys, *values)}
        if len(shapes) != 1:
            raise UnsupportedError(
                f"the layers of this model ({model.config.model_type}) do not all cache keys and values of one shape",
                where="adapter.method",
                hint="set it to prompt_tuning",
            )
        _, heads, _, width = shapes.pop()
        return cls(len(keys), heads, width)


@torch.no_grad()
def prefix_of_tokens(model: PreTrainedModel, ids_P: Tensor) -> Tensor:
    """The prefix that is equivalent to these tokens, shape (P, 2 L H D), float32: their cached keys and values.

    Source: Li and Liang 2021, arXiv 2101.00190, section 7.4: activations of real words are the best initial prefix.
    """
    keys, values = _cached(model, ids_P[None].to(model.device))
    pairs_LHPD = torch.stack([tensor[0].float() for pair in zip(keys, values, strict=True) for tensor in pair])
    return pairs_LHPD.permute(2, 0, 1, 3).flatten(1)


class _Prompts(NamedTuple):
    """A prompt for each row, shape (B, P, E); shorter ones are padded on the left, where the mask (B, P) is 0."""

    embeddings_BPE: Tensor
    mask_BP: Tensor


class _Rows(NamedTuple):
    """Rows with their prompt: ids and mask of shape (B, P + T), embeddings (B, P + T, E)."""

    ids: Tensor
    embeddings: Tensor
    mask: Tensor


@torch.no_grad()
def _cached(model: PreTrainedModel, ids_BT: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values that each layer caches for these rows, shapes (B, H, T, D)."""
    cache = model.eval()(input_ids=ids_BT, use_cache=True).past_key_values
    return [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]


def _prompted(base: PreTrainedModel, prompts: _Prompts, ids_BT: Tensor, mask_BT: Tensor) -> _Rows:
    """Each row with its prompt between its left padding and its first token.

    Padding between prompt and row would count for sliding windows and distance biases such as ALiBi.
    """
    unshard_non_block(base)  # the embeddings are read here, outside of the base's forward pass
    embeddings_BTE = base.get_input_embeddings()(ids_BT)
    places = prompts.mask_BP.shape[1]
    begin_B1 = _first_column(mask_BT)
    column = torch.arange(places + ids_BT.shape[1], device=ids_BT.device)
    # For each output column its column in the concatenation [prompt, row]. With begin = columns of left padding:
    # output < begin: the padding, at P + output; then P columns of prompt, at output - begin; then the row, unmoved.
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
    """The rows without their prompts, with the generated tokens appended."""
    # With `inputs_embeds` the ids serve only for penalties and stopping.
    written = base.generate(input_ids=rows.ids, inputs_embeds=rows.embeddings, attention_mask=rows.mask, **options)
    return torch.cat([ids_BT, written[:, rows.ids.shape[1] :]], dim=1)


def _refuse_other_rotation(model: SoftPromptModel, ids_BT: Tensor, options: dict[str, Any], keeps_prompt: bool) -> None:
    """Refuse rows for which transformers would compute the tokens behind a soft prompt anew, without the prompt.

    Phi-3 and its relatives drop the cache when a row passes the original length of LongRoPE.

    Args:
        model: The model with its prompt.
        ids_BT: The rows.
        options: Of `generate`.
        keeps_prompt: Whether rows that are longer from the start keep the prompt, because it is not in the cache.

    Raises:
        UnsupportedError: A row may pass the original length.
    """
    rotation = length_rotation(model)
    if rotation is None or not hasattr(model.config, "original_max_position_embeddings"):
        return
    group = rotation.generation_group(ids_BT.shape[1], options.get("max_new_tokens", 1))
    if group > 0 or (group < 0 and not keeps_prompt):
        room = max(0, rotation.original - rotation.prompt)
        raise UnsupportedError(
            f"a row with its answer is longer than the {room} tokens after which this model drops its cache, and the "
            f"soft prompt with it",
            where=model.config.model_type,
            hint="shorten the prompt, or generate fewer tokens",
        )


def _first_column(mask_BT: Tensor) -> Tensor:
    """The column of each row's first token, shape (B, 1)."""
    return mask_BT.argmax(dim=1, keepdim=True)


def _positions(mask_BT: Tensor) -> Tensor:
    """The position of each token in its row, not counting padding."""
    return (mask_BT.cumsum(dim=1) - 1).clamp(min=0)


def _prefixed(rows_BT: Tensor, value: Tensor | int, places: int) -> Tensor:
    """Integer rows (B, T) with `value`, one per row or one for all, in `places` columns before them."""
    before_BP = rows_BT.new_zeros(len(rows_BT), places) + value
    return torch.cat([before_BP, rows_BT], dim=1)

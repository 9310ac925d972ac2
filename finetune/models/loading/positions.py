"""The number of positions of a model, and what a row beyond them meets: no embedding, or a position of no training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from finetune.errors import DataError
from finetune.models.kernels.length_rotation import LengthRotation
from finetune.models.loading.library_errors import errors_as_model_error
from finetune.models.loading.meta_model import meta_model, read_config
from finetune.models.loading.model_files import ModelFolder
from finetune.recipe.sections.model import Model

logger = logging.getLogger(__name__)

POSITION_KEYS = (
    "max_position_embeddings",  # most architectures
    "n_positions",  # GPT, GPT-2, GPT-J, GPTBigCode, CodeGen, CTRL
    "max_seq_len",  # MPT, DBRX
    "seq_length",  # BLOOM
    "model_max_length",  # Kimi Linear, Bailing
    "max_sequence_length",  # converted checkpoints of the first Llama
    "context_length",  # RWKV
    "max_target_positions",  # decoders of speech models
    "n_ctx",  # GPT, beside n_positions
)
"""Attributes of a model's configuration for the context length, in the order of precedence."""


@dataclass(frozen=True)
class PositionLimit:
    """Tokens of the longest row that a model is made for.

    Attributes:
        count: Their number; None where the configuration has none (state-space models).
        is_table: Whether longer rows fail, because positions are the rows of a table. Others are computed for any
            length (rotation, ALiBi): longer rows run, at positions without training.
        rotation: Set where the rotation depends on the longest row of a pass.
        prompt: Positions of a soft prompt, which are not part of the number.
    """

    count: int | None
    is_table: bool = False
    rotation: LengthRotation | None = None
    prompt: int = 0

    def after(self, prompt_tokens: int) -> PositionLimit:
        """The limit of rows behind a soft prompt of so many tokens."""
        return replace(
            self,
            count=None if self.count is None else self.count - prompt_tokens,
            rotation=self.rotation and replace(self.rotation, prompt=prompt_tokens),
            prompt=prompt_tokens,
        )

    def exceeded_by(self, tokens: int) -> bool:
        """Whether a row of so many tokens is longer than the limit."""
        return self.count is not None and tokens > self.count

    def check_rows(self, lengths: Sequence[int], place: Callable[[int], str], what: str, hint: str) -> None:
        """Refuse rows beyond a table of positions; warn of rows beyond positions that are computed.

        Args:
            lengths: Tokens of each row.
            place: The place of the row of an index.
            what: What the rows are, in the plural.
            hint: The fix.

        Raises:
            DataError: A row is longer than the table.
        """
        longer = [row for row, tokens in enumerate(lengths) if self.exceeded_by(int(tokens))]
        if not longer:
            return
        if self.is_table:
            raise DataError(
                f"the row has {lengths[longer[0]]} tokens, more than the {self._positions} of the model "
                f"({len(longer)} of {len(lengths)} {what} are longer)",
                where=place(longer[0]),
                hint=hint,
            )
        logger.warning(
            "%d of %d %s are longer than the %s of the model, which was not trained beyond them (the longest has %d "
            "tokens): %s",
            *(len(longer), len(lengths), what, self._positions, max(lengths), hint),
        )

    def check_room(self, lengths: Sequence[int], place: Callable[[int], str], new_tokens: int, key: str) -> None:
        """The same for prompts that are continued by up to `new_tokens` tokens.

        Args:
            lengths: Tokens of each prompt.
            place: The place of the prompt of an index.
            new_tokens: Tokens of the longest answer.
            key: The option that sets them.

        Raises:
            DataError: A prompt leaves no room for the longest answer.
        """
        longer = [row for row, tokens in enumerate(lengths) if self.exceeded_by(tokens + new_tokens)]
        if not longer:
            return
        if self.is_table:
            tokens = lengths[longer[0]]
            left = max((self.count or 0) - tokens, 0)
            raise DataError(
                f"a prompt of {tokens} tokens and an answer of {new_tokens} exceed the {self._positions} of the model",
                where=place(longer[0]),
                hint=f"set {key} to {left} or less" if left else "shorten the prompt",
            )
        logger.warning(
            "%d of %d prompts with answers of %d tokens are longer than the %s of the model, which was not trained "
            "beyond them",
            *(len(longer), len(lengths), new_tokens, self._positions),
        )

    @property
    def _positions(self) -> str:
        return f"{max(self.count or 0, 0)} positions" + f" after the {self.prompt} of its soft prompt" * bool(
            self.prompt
        )


def position_limit(folder: ModelFolder) -> PositionLimit:
    """The positions of the model in a folder, from its configuration; where that cannot tell, from its modules.

    Raises:
        ModelError: transformers does not know the architecture.
    """
    config = read_config(folder)
    text = config.get_text_config()
    found = (getattr(text, key, None) for key in POSITION_KEYS)
    count = next((value for value in found if type(value) is int and value > 0), None)
    if getattr(text, "rope_parameters", None):
        return _rotated(text, count)
    if count is None:
        return PositionLimit(None)
    with errors_as_model_error(str(folder.path)):
        model = meta_model(config, Model(name=folder.name), torch.float32)
    # Several tables (an image encoder's beside the decoder's): the one that the configuration describes.
    tables = [usable for rows, usable in _tables(model) if count in (rows, usable)]
    return PositionLimit(min(tables), is_table=True) if tables else PositionLimit(count)


def _rotated(text: Any, count: int | None) -> PositionLimit:
    rotation = LengthRotation.of(text)
    factors = [
        each["factor"]
        for each in (text.rope_parameters, *text.rope_parameters.values())
        if isinstance(each, dict) and "dynamic" in str(each.get("rope_type"))
    ]
    # With dynamic NTK `max_position_embeddings` is the length before scaling.
    return PositionLimit(count and int(count * max(factors, default=1)), rotation=rotation)


def _tables(model: nn.Module) -> Iterator[tuple[int, int]]:
    """The rows of each table of positions in a model, and how many of them are positions."""
    for name, module in model.named_modules():
        if hasattr(module, "build_mpt_alibi_tensor"):
            yield (module.config.max_seq_len,) * 2
        own = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("pos" in own or own == "wpe"):
            rows = module.num_embeddings
            # OPT and BART count from an offset, RoBERTa from behind the padding's row.
            before = getattr(module, "offset", None) or 0 if module.padding_idx is None else module.padding_idx + 1
            yield rows, rows - before
    for name, buffer in model.named_buffers():
        own = name.rpartition(".")[2]
        # Sinusoids of GPT-J, CodeGen and CTRL, (positions, width). Row numbers, (1, positions), are no table.
        if "pos" in own and buffer.dim() == 2 and buffer.is_floating_point():
            yield (buffer.shape[0],) * 2

"""Tokens that a recipe adds to a model: their ids, and their rows in the embeddings and the output head.

Shape legend: R rows of a matrix, one for each token.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.errors import UnsupportedError
from finetune.quantizers.base import is_quantized
from finetune.recipe.sections.model import NewToken

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 1 << 12
"""Rows that are summed in float64 at once."""


@dataclass(frozen=True)
class NewRows:
    """The rows of tokens that a recipe adds to a model.

    Attributes:
        total: Rows of the embeddings, and of the head, with them.
        trained: Ids of the tokens that the recipe adds or names, and of all tokens without a row in the files.
        fresh: Those ids of `trained` whose rows in the files belonged to no token.
        unused: Ids of all rows in the files that belonged to no token: padding of the vocabulary.
    """

    total: int
    trained: tuple[int, ...]
    fresh: tuple[int, ...] = ()
    unused: tuple[int, ...] = ()

    @torch.no_grad()
    def extended(self, rows: Tensor) -> Tensor:
        """A matrix or bias of the files, shape (R, ...), with the new rows at the mean of the tokens' rows.

        Source: Hewitt 2021, Initializing New Word Embeddings for Pretrained Language Models,
        https://nlp.stanford.edu/~johnhew/vocab-expansion.html: with the mean, a new token takes at most 1/n of the
        probability from the n others.
        """
        is_token = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        is_token[list(self.unused)] = False
        parts = zip(rows.split(ROWS_AT_ONCE), is_token.split(ROWS_AT_ONCE), strict=True)
        total = torch.stack([part[used].double().sum(0) for part, used in parts]).sum(0)
        found = rows.new_empty(max(self.total, len(rows)), *rows.shape[1:])
        found[: len(rows)] = rows
        mean = (total / is_token.sum()).to(rows.dtype)
        found[len(rows) :] = mean
        found[list(self.fresh)] = mean
        return found


def add_tokens(
    tokenizer: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase | None, tokens: Sequence[NewToken], rows: int
) -> NewRows | None:
    """Add tokens to a tokenizer that lacks them.

    Args:
        tokenizer: The tokenizer, which is changed; it may have the tokens already.
        base: The tokenizer of the model's files; None if it cannot be read.
        tokens: `model.new_tokens`.
        rows: Of the embeddings in the model's files.

    Returns:
        None where nothing is added and every token has a row.
    """
    known = [] if base is None else [token_id(base, each.token) for each in tokens]
    for each in tokens:
        if token_id(tokenizer, each.token) is None:
            added = AddedToken(each.token, special=each.special, normalized=False)
            tokenizer.add_tokens([added], special_tokens=each.special)
    ids = [token_id(tokenizer, each.token) for each in tokens]
    there = [each.token for each, index in zip(tokens, known, strict=False) if index is not None and index < rows]
    if there:
        logger.info("model.new_tokens: %s: the vocabulary has them, and their rows stay", ", ".join(map(repr, there)))
    own = set(tokenizer.get_vocab().values())
    without_row = sorted(index for index in own if index >= rows)
    named = [index for index in ids if index is not None]
    trained = tuple(dict.fromkeys([*named, *without_row]))
    lacking = {index for index, before in zip(named, known, strict=False) if before is None and index < rows}
    unused = set(range(rows)) - own | lacking
    if not trained:
        return None
    total = max(rows, *(index + 1 for index in trained))
    return NewRows(total, trained, tuple(sorted(lacking)), tuple(sorted(unused)))


def token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The id of the one token that a text is; None if it is none."""
    added = tokenizer.get_added_vocab().get(text)
    if added is not None:
        return int(added)
    pieces = tokenizer(text, add_special_tokens=False)["input_ids"]
    return int(pieces[0]) if len(pieces) == 1 and pieces[0] != tokenizer.unk_token_id else None


def keep_as_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Collection[str]) -> None:
    """Let these tokens be tokens in the words of conversations too, where other control tokens are plain text.

    They are the attribute `named_tokens` of the tokenizer.
    """
    tokenizer.named_tokens = frozenset({*getattr(tokenizer, "named_tokens", ()), *tokens})


def vocabulary_tensors(model: PreTrainedModel) -> dict[str, tuple[nn.Module, str]]:
    """The parameters of a model with a row for each token: embeddings, output head and its bias.

    Returns:
        By the parameter's name, its module and its name there; tied ones under every name.

    Raises:
        UnsupportedError: The output head is quantized.
    """
    owners = [model.get_input_embeddings(), model.get_output_embeddings()]
    if any(is_quantized(owner) for owner in owners):
        raise UnsupportedError(
            "the output head is quantized, and quantized weights get no rows",
            where="model.new_tokens",
            hint="name a model with an unquantized head in model.name",
        )
    return {
        f"{name}.{own}": (module, own)
        for name, module in model.named_modules(remove_duplicate=False)
        if any(module is owner for owner in owners)
        for own, _ in module.named_parameters(recurse=False)
    }


@torch.no_grad()
def extend_vocabulary(model: Any, rows: NewRows) -> None:
    """Give a loaded model the rows of new tokens; tied weights stay tied."""
    values: dict[int, Tensor] = {}
    names = {}
    for name, (module, own) in vocabulary_tensors(model).items():
        parameter = getattr(module, own)
        values.setdefault(id(parameter), rows.extended(parameter))
        names[name] = values[id(parameter)]
    model.resize_token_embeddings(rows.total, mean_resizing=False)
    for name, (module, own) in vocabulary_tensors(model).items():  # the head may be another module now
        getattr(module, own).copy_(names[name])

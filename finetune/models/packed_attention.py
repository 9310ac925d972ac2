"""Causal attention for examples that stand one after the other in a row: each by itself, with no mask of T x T.

transformers hands the 4-dimensional mask that a model is called with to the attention of every layer as it is. Here
that "mask" holds the bounds of examples, which is all that this kernel needs to know. Called with any other
mask, or none, it is `sdpa`.

Shape legend: H heads, G heads of keys and values, R = H / G, T tokens of the row, N tokens of a block of queries,
K keys that the block sees, D numbers of a head, E examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "ft_packed"
"""Of the kernel, for transformers."""

BLOCK = 128
"""Queries that are worked on together: few enough that their scores stay in the cache, and that little is computed
above the diagonal only to be masked; an example up to half longer is one block."""


def bounds_of(positions_BT: Tensor) -> Tensor:
    """Where examples begin, and the end of the last, as the mask that the kernel takes: int32, shape (1, 1, 1, E + 1).

    Args:
        positions_BT: Positions of a single row; each example's begin at 0.
    """
    starts_E = (positions_BT[0] == 0).nonzero().squeeze(1)
    return torch.cat([starts_E, starts_E.new_tensor([positions_BT.shape[1]])]).int().view(1, 1, 1, -1)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: (1, H, T, D), (1, G, T, D) twice -> (1, T, H, D).

    Raises:
        NotImplementedError: The model asks for more than a scale and a window.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return plain
    if dropout or any(others.get(name) is not None for name in ("softcap", "position_bias", "s_aux")):
        raise NotImplementedError("attention with dropout, a cap, a bias or sinks")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = _dtype(value)
    query, key, value = (heads[0].transpose(0, 1).to(dtype) for heads in (query, key, value))
    if query.is_cuda and query.dtype.itemsize == 2:
        bounds = attention_mask.flatten()
        longest = int(bounds.diff().max())
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        output: Any = varlen_attn(
            query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=window, enable_gqa=True
        )
    else:
        output = _Packed.apply(query, key, value, tuple(attention_mask.flatten().tolist()), scale, sliding_window)
    return output[None], None


def _dtype(value: Tensor) -> torch.dtype:
    """What attention is computed in: as autocast says, and else as values come, for rotations may widen the rest."""
    device = value.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype


class _Block(NamedTuple):
    """Queries that are worked on together, and the keys they see.

    Attributes:
        rows: Places of the N queries.
        columns: Places of the K keys; the last N are those of the queries.
    """

    rows: slice
    columns: slice

    def scores(self, query_GND: Tensor, key_GKD: Tensor, scale: float, window: int | None) -> Tensor:
        """The queries' probabilities over the keys, shape (G, R * N, K)."""
        groups, rows, keys = query_GND.shape[0], self.rows.stop - self.rows.start, key_GKD.shape[1]
        scores = torch.baddbmm(
            query_GND.new_empty(1), query_GND, key_GKD.transpose(1, 2), beta=0, alpha=scale
        ).view(groups, -1, rows, keys)  # fmt: skip
        scores[..., -rows:] += _future(rows, scores.dtype, scores.device)
        if window is not None and self.rows.stop - self.columns.start > window:
            place = torch.arange(self.rows.start, self.rows.stop, device=scores.device)[:, None]
            other = torch.arange(self.columns.start, self.columns.stop, device=scores.device)
            scores.masked_fill_(other <= place - window, float("-inf"))
        return scores.softmax(-1).view(groups, -1, keys)


def _blocks(bounds: tuple[int, ...], window: int | None) -> Iterator[_Block]:
    """All blocks, of an example the last first: it sees most keys, and the others' scores fit where its have been."""
    for start, end in pairwise(bounds):
        rows = end - start if end - start <= BLOCK * 1.5 else BLOCK
        for first in reversed(range(start, end, rows)):
            seen_from = start if window is None else max(start, first - window + 1)
            last = min(first + rows, end)
            yield _Block(slice(first, last), slice(seen_from, last))


def _future(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Minus infinity for keys that come after their query, else 0; shape (N, N)."""
    return _largest_future(dtype, device)[:rows, :rows]


@lru_cache
def _largest_future(dtype: torch.dtype, device: torch.device) -> Tensor:
    rows = int(BLOCK * 1.5)
    return torch.full((rows, rows), float("-inf"), dtype=dtype, device=device).triu_(1)


class _Packed(torch.autograd.Function):
    """softmax(s Q K^T) V by blocks of queries; only Q, K and V are kept, probabilities are computed again in backward.

    Each block sees all its keys at once, so that no running sums are needed, and nothing but a block is ever as long as
    tokens times tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], scale: float, window: int | None
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.settings = bounds, scale, window
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        for block in _blocks(bounds, window):
            query_GND, key_GKD = _by_group(query, block.rows, key.shape[1]), key[block.columns].transpose(0, 1)
            chances = block.scores(query_GND, key_GKD, scale, window)
            _put_back(output, block.rows, chances @ value[block.columns].transpose(0, 1))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        bounds, scale, window = ctx.settings
        groups = key.shape[1]
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(heads, dtype=torch.float32) for heads in (key, value))
        for block in _blocks(bounds, window):
            query_GND = _by_group(query, block.rows, groups)
            gradient_GND = _by_group(gradient, block.rows, groups)
            key_GKD, value_GKD = (heads[block.columns].transpose(0, 1) for heads in (key, value))
            chances = block.scores(query_GND, key_GKD, scale, window)
            of_value[block.columns] += (chances.transpose(1, 2) @ gradient_GND).transpose(0, 1)
            of_chances = gradient_GND @ value_GKD.transpose(1, 2)
            of_scores = torch._softmax_backward_data(of_chances, chances, -1, chances.dtype)
            _put_back(of_query, block.rows, of_scores @ key_GKD)
            of_key[block.columns] += (of_scores.transpose(1, 2) @ query_GND).transpose(0, 1)
        return of_query.mul_(scale), of_key.mul_(scale).to(key.dtype), of_value.to(value.dtype), None, None, None


def _by_group(heads: Tensor, rows: slice, groups: int) -> Tensor:
    """Some rows of (T, H, D), those of heads that share their keys one under the other: (G, R * N, D)."""
    return heads[rows].unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _put_back(heads: Tensor, rows: slice, part_GND: Tensor) -> None:
    """The reverse: (G, R * N, D) into some rows of (T, H, D)."""
    count = rows.stop - rows.start
    heads[rows] = part_GND.unflatten(1, (-1, count)).flatten(0, 1).transpose(0, 1)


# Left out of what is compiled: its loops would be compiled for each number of examples.
AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
AttentionMaskInterface.register(NAME, sdpa_mask)

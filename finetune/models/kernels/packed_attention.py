"""Causal attention for examples that stand one after the other in a row: each by itself, with no mask of T x T.

Tokens that an example begins with as the one before it does may stand in the row once, with the latter: what a causal
model computes for them is the same for both. An example's own tokens then begin at a later position than 0.

transformers hands the 4-dimensional mask that a model is called with to the attention of every layer as it is. Here
that "mask" holds the bounds of examples, which is all that this kernel needs to know. Called with any other
mask, or none, it is `sdpa`.

Shape legend: H heads, G heads of keys and values, R = H / G, T tokens of the row, N tokens of a block of queries,
K keys that the block sees, D numbers of a head, E examples, S all tokens of an example.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "ft_packed"
"""Of the kernel, for transformers."""

BLOCK = 128
"""Queries that are worked on together: few enough that their scores stay in the cache, and that little is computed
above the diagonal only to be masked; an example up to half longer is one block, and so are as many short ones in a row
that go on from the same tokens, or from none."""


def example_bounds(positions_BT: Tensor) -> Tensor:
    """Where examples' own tokens begin, as the mask that the kernel takes: int32, shape (1, 1, 2, E + 1).

    First their places in the row and its end, then their positions, and 0. It lies on the CPU, where every layer looks
    at its numbers without waiting for a GPU.

    Args:
        positions_BT: Positions of a single row. An example that begins at p > 0 goes on from the first p tokens of the
            one before it, which has more.
    """
    positions_T = positions_BT[0].cpu()
    starts_E = (positions_T.diff(prepend=positions_T.new_tensor([-2])) != 1).nonzero().squeeze(1)
    places = torch.cat([starts_E, starts_E.new_tensor([len(positions_T)])])
    firsts = torch.cat([positions_T[starts_E], starts_E.new_zeros(1)])
    return torch.stack([places, firsts]).int()[None, None]


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
    dtype = compute_dtype(value)
    query, key, value = (heads[0].transpose(0, 1).to(dtype) for heads in (query, key, value))
    places, firsts = map(tuple, attention_mask[0, 0].tolist())
    if uses_flash(query):
        output: Any = _flash_attention(
            query, key, value, _varlen_meta(places, firsts, query.device), scale, sliding_window
        )
    else:
        output = _Packed.apply(
            query, key, value, _merged_examples(places, firsts, sliding_window), scale, sliding_window
        )
    return output[None], None


def uses_flash(query: Tensor) -> bool:
    """Whether flash attention computes this: it takes 16-bit tensors on a CUDA device."""
    return query.is_cuda and query.dtype.itemsize == 2


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, lines: _VarlenMeta, scale: float, window: int | None
) -> Tensor:
    """Variable-length flash attention over the row: queries (T, H, D), keys and values (T, G, D) -> (T, H, D).

    This calls the ATen op that `torch.nn.attention.varlen.varlen_attn` wraps. The wrapper's arguments differ between
    PyTorch versions (2.10 has no `scale`, `window_size` and `enable_gqa`, 2.11 no `enable_gqa`). The schema of the op
    up to `window_size_right`, and its derivative, are the same from 2.10 to 2.14. The op takes G < H as it is.

    Source: Dao 2023 (FlashAttention-2), arXiv 2307.08691. The causal mask is aligned to the last query and the last
    key, so that queries which begin at position p of their example see the p keys before them.

    Raises:
        NotImplementedError: The kernel has no such head dimension.
    """
    head_dim = query.shape[-1]
    # Its backward pass takes no other head dimensions, and a probe of the forward pass alone would not show that.
    if head_dim % 8 or head_dim > 256:
        raise NotImplementedError(f"flash attention with a head dimension of {head_dim}")
    if lines.seen is not None:
        key, value = key.index_select(0, lines.seen), value.index_select(0, lines.seen)
    output: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        lines.cu_seqlens_q,
        lines.cu_seqlens_k,
        lines.max_seqlen_q,
        lines.max_seqlen_k,
        0.0,  # dropout
        window is None,  # causal; with a window, the two sizes below say the same and more
        False,  # no debug mask
        scale=scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
    )[0]
    return output


def compute_dtype(value: Tensor) -> torch.dtype:
    """Autocast's type where it is enabled, else that of `value`: rotations may widen queries and keys."""
    device = value.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype


class _Block(NamedTuple):
    """Queries that are worked on together, and the keys they see.

    Attributes:
        rows: Places of the N queries in the row.
        columns: Positions of the K keys in the example; the last N are those of the queries.
        branches: How many of the queries each of several examples has; one number where they are of one.
    """

    rows: slice
    columns: slice
    branches: tuple[int, ...]

    def scores(self, query_GND: Tensor, key_GKD: Tensor, scale: float, window: int | None) -> Tensor:
        """The queries' probabilities over the keys, shape (G, R * N, K)."""
        groups, rows, keys = query_GND.shape[0], self.rows.stop - self.rows.start, key_GKD.shape[1]
        scores = torch.baddbmm(
            query_GND.new_empty(1), query_GND, key_GKD.transpose(1, 2), beta=0, alpha=scale
        ).view(groups, -1, rows, keys)  # fmt: skip
        # Not the whole `mask`: on long rows, a pass over all their keys is a tenth of the time.
        scores[..., -rows:] += _unseen(self.branches, scores.dtype, scores.device)
        if window is not None and keys > window and len(self.branches) == 1:
            scores.masked_fill_(_beyond(window, rows, keys, scores.device), float("-inf"))
        return scores.softmax(-1).view(groups, -1, keys)

    def mask(self, dtype: torch.dtype, device: torch.device, window: int | None) -> Tensor:
        """What is added to the queries' scores over the keys, shape (N, K)."""
        rows, keys = self.rows.stop - self.rows.start, self.columns.stop - self.columns.start
        mask_NK = functional.pad(_unseen(self.branches, dtype, device), (keys - rows, 0))
        if window is not None and keys > window and len(self.branches) == 1:
            mask_NK.masked_fill_(_beyond(window, rows, keys, device), float("-inf"))
        return mask_NK


class _Example(NamedTuple):
    """Where an example stands, or several short ones that are worked on together.

    Attributes:
        own: Places of the tokens that it does not share with one before it.
        seen: Places of all its S tokens, in the order of their positions.
        length: S.
        branches: Own tokens of each of several, which have all others in common; one number for one.
    """

    own: slice
    seen: tuple[slice, ...]
    length: int
    branches: tuple[int, ...]

    @property
    def stem(self) -> tuple[slice, ...]:
        """Places of what it shares."""
        return self.seen[:-1]

    def with_next(self, other: _Example) -> _Example:
        """This and the next one, which shares as much."""
        own = slice(self.own.start, other.own.stop)
        count = other.own.stop - other.own.start
        return _Example(own, (*self.stem, own), self.length + count, (*self.branches, count))

    def blocks(self, window: int | None) -> Iterator[_Block]:
        """Its blocks, the last first: it sees most keys, and the others' scores fit where its have been."""
        count = self.own.stop - self.own.start
        if len(self.branches) > 1:
            yield _Block(self.own, slice(0, self.length), self.branches)
            return
        rows = count if count <= BLOCK * 1.5 else BLOCK
        for first in reversed(range(0, count, rows)):
            last = min(first + rows, count)
            place = self.length - count + first
            seen_from = 0 if window is None else max(0, place - window + 1)
            queries = slice(self.own.start + first, self.own.start + last)
            yield _Block(queries, slice(seen_from, place + last - first), (last - first,))

    def of(self, heads_TGD: Tensor) -> Tensor:
        """What its tokens have, (S, G, D): a view where they stand together."""
        parts = [heads_TGD[part] for part in self.seen]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def sums(self, heads_TGD: Tensor) -> Tensor:
        """Where sums over its tokens are formed, (S, G, D), before `add`: a view where they stand together."""
        together = len(self.seen) == 1
        return heads_TGD[self.seen[0]] if together else heads_TGD.new_zeros(self.length, *heads_TGD.shape[1:])

    def add(self, heads_TGD: Tensor, own_SGD: Tensor) -> None:
        """Add what has come together in `sums`, unless that is a view."""
        if len(self.seen) > 1:
            parts = own_SGD.split([part.stop - part.start for part in self.seen])
            for part, of_part in zip(self.seen, parts, strict=True):
                heads_TGD[part] += of_part


@lru_cache(maxsize=64)
def _examples(places: tuple[int, ...], firsts: tuple[int, ...]) -> tuple[_Example, ...]:
    """The examples of `example_bounds`."""
    examples: list[_Example] = []
    seen: tuple[slice, ...] = ()
    for (start, end), first in zip(pairwise(places), firsts, strict=False):
        seen = (*_prefix_slices(seen, first), slice(start, end))
        examples.append(_Example(slice(start, end), seen, first + end - start, (end - start,)))
    return tuple(examples)


@lru_cache(maxsize=64)
def _merged_examples(places: tuple[int, ...], firsts: tuple[int, ...], window: int | None) -> tuple[_Example, ...]:
    """The same with short examples that share as much as one, if a window hides nothing of them."""
    found: list[_Example] = []
    for example in _examples(places, firsts):
        goes_along = found and found[-1].stem == example.stem and example.own.stop - found[-1].own.start <= BLOCK
        if goes_along and (window is None or max(found[-1].length, example.length) <= window):
            found[-1] = found[-1].with_next(example)
        else:
            found.append(example)
    return tuple(found)


def _prefix_slices(parts: tuple[slice, ...], count: int) -> Iterator[slice]:
    for part in parts:
        if count > 0:
            yield slice(part.start, min(part.stop, part.start + count))
        count -= part.stop - part.start


class _VarlenMeta(NamedTuple):
    """The examples as flash attention takes them.

    Attributes:
        cu_seqlens_q: Where the tokens of each begin among the queries, and the end, (E + 1,), int32.
        cu_seqlens_k: The same among the keys.
        max_seqlen_q: Queries of an example at most.
        max_seqlen_k: Its keys at most.
        seen: Places of the keys in the row, one example's after the other's; None where these are all places in turn.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    seen: Tensor | None


@lru_cache(maxsize=64)
def _varlen_meta(places: tuple[int, ...], firsts: tuple[int, ...], device: torch.device) -> _VarlenMeta:
    examples = _examples(places, firsts)
    own = [example.own.stop - example.own.start for example in examples]
    lengths = [example.length for example in examples]
    seen = [torch.arange(part.start, part.stop) for example in examples for part in example.seen]
    cu_seqlens_q, cu_seqlens_k = (
        torch.tensor([0, *accumulate(counts)], dtype=torch.int32) for counts in (own, lengths)
    )
    return _VarlenMeta(
        cu_seqlens_q.to(device),
        cu_seqlens_k.to(device),
        max(own),
        max(lengths),
        None if own == lengths else torch.cat(seen).to(device),
    )


def _unseen(branches: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Minus infinity for keys that come after their query or are another example's, else 0; shape (N, N)."""
    rows = sum(branches)
    future_NN = _largest_future(dtype, device)[:rows, :rows]
    if len(branches) == 1:
        return future_NN
    counts = torch.tensor(branches, device=device)
    number_N = torch.arange(len(branches), device=device).repeat_interleave(counts, output_size=rows)
    return future_NN.masked_fill(number_N[:, None] != number_N, float("-inf"))


def _beyond(window: int, rows: int, keys: int, device: torch.device) -> Tensor:
    """Whether a key comes so long before a query, of the last of the keys, that a window hides it; shape (N, K)."""
    place_K = torch.arange(keys, device=device)
    return place_K <= place_K[-rows:, None] - window


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
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        examples: tuple[_Example, ...],
        scale: float,
        window: int | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.settings = examples, scale, window
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        by_kernel = _prefers_kernel(query.dtype)
        for example in examples:
            key_SGD, value_SGD = example.of(key), example.of(value)
            if by_kernel:
                key_SGD, value_SGD = (
                    heads.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for heads in (key_SGD, value_SGD)
                )
            for block in example.blocks(window):
                key_GKD, value_GKD = (heads[block.columns].transpose(0, 1) for heads in (key_SGD, value_SGD))
                query_GND = _by_group(query, block.rows, len(key_GKD))
                if by_kernel:
                    mask_NK = block.mask(query.dtype, query.device, window)
                    (result_GND,) = functional.scaled_dot_product_attention(
                        query_GND[None], key_GKD[None], value_GKD[None], mask_NK, scale=scale
                    )
                else:
                    result_GND = block.scores(query_GND, key_GKD, scale, window) @ value_GKD
                _scatter_rows(output, block.rows, result_GND)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        examples, scale, window = ctx.settings
        groups = key.shape[1]
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(heads, dtype=torch.float32) for heads in (key, value))
        for example in examples:
            key_SGD, value_SGD = example.of(key), example.of(value)
            of_key_SGD, of_value_SGD = example.sums(of_key), example.sums(of_value)
            for block in example.blocks(window):
                query_GND = _by_group(query, block.rows, groups)
                gradient_GND = _by_group(gradient, block.rows, groups)
                key_GKD, value_GKD = (heads[block.columns].transpose(0, 1) for heads in (key_SGD, value_SGD))
                probs = block.scores(query_GND, key_GKD, scale, window)
                of_value_SGD[block.columns] += (probs.transpose(1, 2) @ gradient_GND).transpose(0, 1)
                of_probs = gradient_GND @ value_GKD.transpose(1, 2)
                of_scores = torch._softmax_backward_data(of_probs, probs, -1, probs.dtype)
                _scatter_rows(of_query, block.rows, of_scores @ key_GKD)
                of_key_SGD[block.columns] += (of_scores.transpose(1, 2) @ query_GND).transpose(0, 1)
            example.add(of_key, of_key_SGD)
            example.add(of_value, of_value_SGD)
        return of_query.mul_(scale), of_key.mul_(scale).to(key.dtype), of_value.to(value.dtype), None, None, None


def _prefers_kernel(dtype: torch.dtype) -> bool:
    """Whether PyTorch's kernel is as fast as products one by one: without AMX it multiplies 16 bits as float32."""
    return dtype.itemsize > 2 or bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _by_group(heads: Tensor, rows: slice, groups: int) -> Tensor:
    """Some rows of (T, H, D), those of heads that share their keys one under the other: (G, R * N, D)."""
    return heads[rows].unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _scatter_rows(heads: Tensor, rows: slice, part_GND: Tensor) -> None:
    """The reverse: (G, R * N, D) into some rows of (T, H, D)."""
    count = rows.stop - rows.start
    heads[rows] = part_GND.unflatten(1, (-1, count)).flatten(0, 1).transpose(0, 1)


# Left out of what is compiled: its loops would be compiled for each number of examples.
AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
AttentionMaskInterface.register(NAME, sdpa_mask)

"""Packed (variable-length) causal attention: several examples in one flattened row, without a mask of T x T.

Attention stays within each example (no cross-contamination). Two consecutive examples may share a prefix: its tokens
stand in the row once, with the first of them, because a causal model computes the same keys and values for both. The
positions of the second example's tokens then start at the length of the prefix, not at 0.

Two prompts, `abc` and `gh`, with three answers, `de`, `f` and `i`; each letter is a token:

    row                  a b c d e | f | g h i
    positions            0 1 2 3 4 | 3 | 0 1 2
    segments             0           1   2
    starts, and the end  0           5   6      9     row 0 of `example_bounds`
    prefix lengths       0           3   0      0     row 1 of `example_bounds`; the last 0 is padding
    keys of a segment    a b c d e   a b c f     g h i
    cu_seqlens_q         0           5   6      9     queries: each token once
    cu_seqlens_k         0           5   9      12    keys: the prefix of segment 1 counts again

transformers passes a 4-dimensional attention mask to every layer unchanged. This kernel uses that argument for the
bounds of the examples, as int32. Called with a mask of another dtype, or with none, it is `sdpa`.

Shape legend: H query heads, G key/value heads, R = H / G, T tokens of the row, N queries of a query block, K keys of a
query block, D head dimension, E examples, S keys of a segment.
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

from finetune.models.kernels.parts import iterations

NAME = "ft_packed"
"""The kernel's name in transformers' `AttentionInterface`."""

BLOCK = 128
"""Queries of a query block: few enough that their scores stay in the cache, and that little is computed above the
diagonal only to be masked. A segment of up to 1.5 times this length is one block, and so are consecutive short segments
with the same prefix (or none) up to this length in total."""


def example_bounds(positions_BT: Tensor) -> Tensor:
    """The bounds of examples in a row, in place of an attention mask: int32, shape (1, 1, 2, E + 1), on the CPU.

    Row 0: the index of each example's first query, then T. Row 1: the length of each example's shared prefix, then 0.

    Args:
        positions_BT: Positions of a single row (B = 1). An example whose positions start at p > 0 shares the first p
            tokens of the example before it, which is longer than p.
    """
    # On the CPU: every layer reads these numbers in Python, and must not wait for a GPU.
    positions_T = positions_BT[0].cpu()
    # An example starts wherever positions do not go up by 1; the prepended -2 makes index 0 a start.
    starts_E = (positions_T.diff(prepend=positions_T.new_tensor([-2])) != 1).nonzero().squeeze(1)
    starts = torch.cat([starts_E, starts_E.new_tensor([len(positions_T)])])
    prefix_lengths = torch.cat([positions_T[starts_E], starts_E.new_zeros(1)])
    return torch.stack([starts, prefix_lengths]).int()[None, None]


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
    """The attention function that transformers calls in every layer: (1, H, T, D), (1, G, T, D) twice -> (1, T, H, D).

    Args:
        module: The attention module; only `sdpa` uses it.
        query: Queries.
        key: Keys.
        value: Values.
        attention_mask: The result of `example_bounds`, or another mask for `sdpa`.
        dropout: Probability; must be 0.
        scaling: Factor of the scores; D^-0.5 if None.
        sliding_window: How many keys a query sees at most, its own included; None for all.
        **others: Further settings of a model's attention.

    Raises:
        NotImplementedError: The model needs more than a scale and a window.
    """
    # int32 marks our own bounds: transformers' masks are bool or of a floating-point dtype.
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
    # As tuples: the functions below are cached, and all layers of a step have the same bounds.
    starts, prefix_lengths = map(tuple, attention_mask[0, 0].tolist())
    if uses_flash(query):
        meta = _varlen_meta(starts, prefix_lengths, query.device)
        output: Any = _flash_attention(query, key, value, meta, scale, sliding_window)
    else:
        segments = _merged_segments(starts, prefix_lengths, sliding_window)
        output = _PackedAttention.apply(query, key, value, segments, scale, sliding_window)
    return output[None], None


def uses_flash(query: Tensor) -> bool:
    """Whether flash attention is used: it takes 16-bit tensors on a CUDA device."""
    return query.is_cuda and query.dtype.itemsize == 2


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, meta: _VarlenMeta, scale: float, window: int | None
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
    # Its backward pass supports no other head dimensions, and a probe of the forward pass alone would not show that.
    if head_dim % 8 or head_dim > 256:
        raise NotImplementedError(f"flash attention with a head dimension of {head_dim}")
    if meta.key_index is not None:
        key, value = key.index_select(0, meta.key_index), value.index_select(0, meta.key_index)
    output: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        meta.cu_seqlens_q,
        meta.cu_seqlens_k,
        meta.max_seqlen_q,
        meta.max_seqlen_k,
        0.0,  # dropout
        window is None,  # causal; with a window, `window_size_right=0` below is the causal mask
        False,  # no debug mask
        scale=scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
    )[0]
    return output


def compute_dtype(value: Tensor) -> torch.dtype:
    """Autocast's dtype where it is enabled, else that of `value`: rotary embeddings may widen queries and keys."""
    device = value.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype


class _QueryBlock(NamedTuple):
    """Queries that are computed together, and their keys.

    Attributes:
        queries: Indices of the N queries in the row.
        keys: Positions of the K keys in the segment; the last N are those of the queries.
        branch_lengths: Number of queries of each example in the block; a single number if all are of one example.
    """

    queries: slice
    keys: slice
    branch_lengths: tuple[int, ...]

    def key_count(self) -> int:
        """K."""
        return self.keys.stop - self.keys.start

    def probs(self, query_GND: Tensor, key_GKD: Tensor, scale: float, window: int | None) -> Tensor:
        """softmax(scale Q K^T) under the mask, shape (G, R * N, K); query_GND is of shape (G, R * N, D)."""
        groups, rows, keys = query_GND.shape[0], self.queries.stop - self.queries.start, key_GKD.shape[1]
        # beta=0: the first argument is not read; `baddbmm` is used to scale within the matmul.
        scores = torch.baddbmm(
            query_GND.new_empty(1), query_GND, key_GKD.transpose(1, 2), beta=0, alpha=scale
        ).view(groups, -1, rows, keys)  # fmt: skip
        # Only the diagonal block of N x N can hide anything: all earlier keys are visible to each of these queries.
        # Adding the full `mask` instead would be a pass over all K keys, a tenth of the time on long rows.
        scores[..., -rows:] += _diagonal_mask(self.branch_lengths, scores.dtype, scores.device)
        if window is not None and keys > window and len(self.branch_lengths) == 1:
            scores.masked_fill_(_outside_window(window, rows, keys, scores.device), float("-inf"))
        return scores.softmax(-1).view(groups, -1, keys)

    def mask(self, dtype: torch.dtype, device: torch.device, window: int | None) -> Tensor:
        """The additive mask of the queries' scores over the keys: 0 or -inf, shape (N, K)."""
        rows, keys = self.queries.stop - self.queries.start, self.key_count()
        mask_NK = functional.pad(_diagonal_mask(self.branch_lengths, dtype, device), (keys - rows, 0))
        # Segments of several examples are merged only if the window hides none of their keys (`_merged_segments`).
        if window is not None and keys > window and len(self.branch_lengths) == 1:
            mask_NK.masked_fill_(_outside_window(window, rows, keys, device), float("-inf"))
        return mask_NK


class _Segment(NamedTuple):
    """Queries and keys of one example, or of several short ones with the same prefix that are computed together.

    Attributes:
        queries: Indices in the row of the tokens behind the shared prefix.
        key_slices: Indices in the row of all S keys, ordered by position: the prefix, then the queries' own.
        key_count: S.
        branch_lengths: Number of queries of each example, which share the prefix; a single number for one example.
    """

    queries: slice
    key_slices: tuple[slice, ...]
    key_count: int
    branch_lengths: tuple[int, ...]

    @property
    def prefix(self) -> tuple[slice, ...]:
        """Indices in the row of the shared prefix; empty if there is none."""
        return self.key_slices[:-1]

    def with_next(self, other: _Segment) -> _Segment:
        """This and the next segment, which has the same prefix, as one."""
        queries = slice(self.queries.start, other.queries.stop)
        count = other.queries.stop - other.queries.start
        key_slices, key_count = (*self.prefix, queries), self.key_count + count
        return _Segment(queries, key_slices, key_count, (*self.branch_lengths, count))

    def query_blocks(self, window: int | None) -> Iterator[_QueryBlock]:
        """Its blocks, the last first: that one has the most keys, so the others' scores fit into its freed memory."""
        count = self.queries.stop - self.queries.start
        if len(self.branch_lengths) > 1:
            yield _QueryBlock(self.queries, slice(0, self.key_count), self.branch_lengths)
            return
        # Up to 1.5 blocks are one block: a second, nearly empty one would cost more than the masked triangle.
        rows = count if count <= BLOCK * 1.5 else BLOCK
        for first in reversed(range(0, count, rows)):
            last = min(first + rows, count)
            position = self.key_count - count + first
            first_key = 0 if window is None else max(0, position - window + 1)
            queries = slice(self.queries.start + first, self.queries.start + last)
            yield _QueryBlock(queries, slice(first_key, position + last - first), (last - first,))

    def gather_keys(self, heads_TGD: Tensor) -> Tensor:
        """Keys (or values) of the segment, (S, G, D): a view if they are contiguous in the row, else a copy."""
        parts = [heads_TGD[part] for part in self.key_slices]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def grad_buffer(self, heads_TGD: Tensor) -> Tensor:
        """A buffer for the gradient of the segment's keys, (S, G, D): a view of `heads_TGD` if they are contiguous."""
        if len(self.key_slices) == 1:
            return heads_TGD[self.key_slices[0]]
        return heads_TGD.new_zeros(self.key_count, *heads_TGD.shape[1:])

    def scatter_grad(self, heads_TGD: Tensor, grad_SGD: Tensor) -> None:
        """Add the buffer from `grad_buffer` to the gradient of the row, unless it is a view of that."""
        if len(self.key_slices) > 1:
            parts = grad_SGD.split([part.stop - part.start for part in self.key_slices])
            for part, of_part in zip(self.key_slices, parts, strict=True):
                heads_TGD[part] += of_part


@lru_cache(maxsize=64)
def _segments(starts: tuple[int, ...], prefix_lengths: tuple[int, ...]) -> tuple[_Segment, ...]:
    """One segment for each example of `example_bounds`."""
    segments: list[_Segment] = []
    key_slices: tuple[slice, ...] = ()
    for (start, end), prefix_length in zip(pairwise(starts), prefix_lengths, strict=False):
        # The prefix is taken from the keys of the example before, which may itself have a prefix from an earlier one.
        key_slices = (*_prefix_slices(key_slices, prefix_length), slice(start, end))
        segments.append(_Segment(slice(start, end), key_slices, prefix_length + end - start, (end - start,)))
    return tuple(segments)


@lru_cache(maxsize=64)
def _merged_segments(
    starts: tuple[int, ...], prefix_lengths: tuple[int, ...], window: int | None
) -> tuple[_Segment, ...]:
    """`_segments`, with consecutive short ones of the same prefix merged, if a window hides none of their keys."""
    merged: list[_Segment] = []
    for segment in _segments(starts, prefix_lengths):
        is_mergeable = (
            merged
            and merged[-1].prefix == segment.prefix
            and segment.queries.stop - merged[-1].queries.start <= BLOCK
            and (window is None or max(merged[-1].key_count, segment.key_count) <= window)
        )
        if is_mergeable:
            merged[-1] = merged[-1].with_next(segment)
        else:
            merged.append(segment)
    return tuple(merged)


def _prefix_slices(parts: tuple[slice, ...], count: int) -> Iterator[slice]:
    """The first `count` indices of consecutive slices, as slices."""
    for part in parts:
        if count > 0:
            yield slice(part.start, min(part.stop, part.start + count))
        count -= part.stop - part.start


class _VarlenMeta(NamedTuple):
    """The bounds of examples as variable-length flash attention takes them.

    Attributes:
        cu_seqlens_q: Cumulative numbers of queries, (E + 1,), int32.
        cu_seqlens_k: Cumulative numbers of keys, (E + 1,), int32; a shared prefix counts for each example.
        max_seqlen_q: The largest number of queries of an example.
        max_seqlen_k: The largest number of keys of an example.
        key_index: Indices of the keys in the row, (cu_seqlens_k[-1],), int64; None without shared prefixes.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    key_index: Tensor | None


@lru_cache(maxsize=64)
def _varlen_meta(starts: tuple[int, ...], prefix_lengths: tuple[int, ...], device: torch.device) -> _VarlenMeta:
    segments = _segments(starts, prefix_lengths)
    query_counts = [segment.queries.stop - segment.queries.start for segment in segments]
    key_counts = [segment.key_count for segment in segments]
    key_index = [torch.arange(part.start, part.stop) for segment in segments for part in segment.key_slices]
    cu_seqlens_q, cu_seqlens_k = (
        torch.tensor([0, *accumulate(counts)], dtype=torch.int32) for counts in (query_counts, key_counts)
    )
    return _VarlenMeta(
        cu_seqlens_q.to(device),
        cu_seqlens_k.to(device),
        max(query_counts),
        max(key_counts),
        None if query_counts == key_counts else torch.cat(key_index).to(device),
    )


def _diagonal_mask(branch_lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """-inf for keys behind their query or of another example, else 0; shape (N, N)."""
    rows = sum(branch_lengths)
    causal_NN = _largest_causal_mask(dtype, device)[:rows, :rows]
    if len(branch_lengths) == 1:
        return causal_NN
    counts = torch.tensor(branch_lengths, device=device)
    # The index of each query's example. `output_size` spares a GPU the synchronization to read the sum of `counts`.
    example_N = torch.arange(len(branch_lengths), device=device).repeat_interleave(counts, output_size=rows)
    return causal_NN.masked_fill(example_N[:, None] != example_N, float("-inf"))


def _outside_window(window: int, rows: int, keys: int, device: torch.device) -> Tensor:
    """Whether a key is `window` or more positions before its query; shape (N, K). The queries are the last N keys."""
    position_K = torch.arange(keys, device=device)
    return position_K <= position_K[-rows:, None] - window


@lru_cache
def _largest_causal_mask(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The additive causal mask of the largest block; smaller ones are its top left corner."""
    rows = int(BLOCK * 1.5)
    return torch.full((rows, rows), float("-inf"), dtype=dtype, device=device).triu_(1)


class _PackedAttention(torch.autograd.Function):
    """softmax(s Q K^T) V by blocks of queries. Only Q, K and V are saved; probabilities are recomputed in backward.

    Each block has all its keys at once, so no running maximum and sum are needed (an online softmax, as in
    FlashAttention). Only a block's scores are ever held, never T x T of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: tuple[_Segment, ...],
        scale: float,
        window: int | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.settings = segments, scale, window
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        by_kernel = _prefers_kernel(query.dtype)
        for segment in segments:
            key_SGD, value_SGD = segment.gather_keys(key), segment.gather_keys(value)
            if by_kernel:
                # One key head for each query head, so that R = 1 and the mask of N x K fits the queries.
                key_SGD, value_SGD = (
                    heads.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for heads in (key_SGD, value_SGD)
                )
            for block in iterations(segment.query_blocks(window), _QueryBlock.key_count):
                key_GKD, value_GKD = (heads[block.keys].transpose(0, 1) for heads in (key_SGD, value_SGD))
                query_GND = _by_group(query, block.queries, len(key_GKD))
                if by_kernel:
                    mask_NK = block.mask(query.dtype, query.device, window)
                    (result_GND,) = functional.scaled_dot_product_attention(
                        query_GND[None], key_GKD[None], value_GKD[None], mask_NK, scale=scale
                    )
                else:
                    result_GND = block.probs(query_GND, key_GKD, scale, window) @ value_GKD
                _scatter_rows(output, block.queries, result_GND)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # With P = softmax(s Q K^T) and O = P V: dV = P^T dO, dP = dO V^T, dS = P * (dP - rowsum(P * dP)),
        # dQ = s dS K, dK = s dS^T Q.
        query, key, value = ctx.saved_tensors
        segments, scale, window = ctx.settings
        groups = key.shape[1]
        grad_query = torch.empty_like(query)
        # dK and dV in float32: several query blocks add into them, and so do all segments with the same prefix. dQ of
        # a query comes from one block alone.
        grad_key, grad_value = (torch.zeros_like(heads, dtype=torch.float32) for heads in (key, value))
        for segment in segments:
            key_SGD, value_SGD = segment.gather_keys(key), segment.gather_keys(value)
            grad_key_SGD, grad_value_SGD = segment.grad_buffer(grad_key), segment.grad_buffer(grad_value)
            for block in iterations(segment.query_blocks(window), _QueryBlock.key_count):
                query_GND = _by_group(query, block.queries, groups)
                gradient_GND = _by_group(gradient, block.queries, groups)
                key_GKD, value_GKD = (heads[block.keys].transpose(0, 1) for heads in (key_SGD, value_SGD))
                # Recomputed by matmuls even where the kernel computed the output: the kernel does not return P.
                probs = block.probs(query_GND, key_GKD, scale, window)
                grad_value_SGD[block.keys] += (probs.transpose(1, 2) @ gradient_GND).transpose(0, 1)
                grad_probs = gradient_GND @ value_GKD.transpose(1, 2)
                grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
                _scatter_rows(grad_query, block.queries, grad_scores @ key_GKD)
                grad_key_SGD[block.keys] += (grad_scores.transpose(1, 2) @ query_GND).transpose(0, 1)
            segment.scatter_grad(grad_key, grad_key_SGD)
            segment.scatter_grad(grad_value, grad_value_SGD)
        # `scale` is applied once at the end, not to the scores' gradient of every block.
        return grad_query.mul_(scale), grad_key.mul_(scale).to(key.dtype), grad_value.to(value.dtype), None, None, None


def _prefers_kernel(dtype: torch.dtype) -> bool:
    """Whether PyTorch's kernel is as fast as separate matmuls: without AMX it computes 16-bit matmuls in float32."""
    return dtype.itemsize > 2 or bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _by_group(heads: Tensor, rows: slice, groups: int) -> Tensor:
    """Some rows of (T, H, D), grouped by key/value head: (G, R * N, D), the R heads of a group below each other.

    One matmul for each group instead of one for each head, without repeating keys and values.
    """
    return heads[rows].unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _scatter_rows(heads: Tensor, rows: slice, part_GND: Tensor) -> None:
    """The inverse of `_by_group`: write (G, R * N, D) into some rows of (T, H, D)."""
    count = rows.stop - rows.start
    heads[rows] = part_GND.unflatten(1, (-1, count)).flatten(0, 1).transpose(0, 1)


# Excluded from compilation: its loops would be compiled anew for each number of examples.
AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
AttentionMaskInterface.register(NAME, sdpa_mask)

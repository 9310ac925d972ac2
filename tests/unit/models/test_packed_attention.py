"""Packed attention matches the reference, `sdpa` with a mask of T x T, in output and gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from finetune.models.kernels import packed_attention
from finetune.models.kernels.packed_attention import BLOCK, example_bounds

LENGTHS = {
    "short": [5, 1, 9],
    "one block and a half": [int(BLOCK * 1.5), 3],
    "several blocks": [3, 2 * BLOCK + 17, BLOCK],
}


def heads(tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries of 4 heads, keys and values of 2; (1, H, T, D)."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, tokens, 16) for count in (4, 2, 2)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def positions(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def reference(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None) -> Tensor:
    """Causal attention within each example, by a mask of T x T."""
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(number))
    seen = (number[:, None] == number) & (place[:, None] >= place)
    if window is not None:
        seen &= place > place[:, None] - window
    result = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.3, enable_gqa=True)
    return result.transpose(1, 2)


def packed(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None = None, **more: Any
) -> Tensor:
    settings = {"scaling": 0.3, "sliding_window": window, **more}
    mask = example_bounds(positions(lengths))
    return packed_attention.packed_attention(SimpleNamespace(), query, key, value, mask, **settings)[0]


@pytest.mark.parametrize("kernel", [True, False], ids=["PyTorch's kernel", "matmuls"])
@pytest.mark.parametrize("window", [None, 4, BLOCK + 5])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_attention_matches_reference_in_output_and_gradients(
    lengths: list[int], window: int | None, kernel: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(packed_attention, "_prefers_kernel", lambda dtype: kernel)
    found, expected = heads(sum(lengths)), heads(sum(lengths))
    one, other = packed(*found, lengths, window), reference(*expected, lengths, window)
    assert torch.allclose(one, other, atol=1e-5)
    weights = torch.randn(one.shape, generator=torch.Generator().manual_seed(1))
    (one * weights).sum().backward()
    (other * weights).sum().backward()
    for mine, own in zip(found, expected, strict=True):
        assert torch.allclose(mine.grad, own.grad, atol=1e-4)


def test_packed_attention_comparison_detects_another_window():
    """The control."""
    lengths = LENGTHS["several blocks"]
    tensors = heads(sum(lengths))
    assert not torch.allclose(packed(*tensors, lengths, 4), reference(*tensors, lengths, 5), atol=1e-3)


def test_packed_attention_in_16_bits_is_as_accurate_as_reference():
    lengths = LENGTHS["several blocks"]
    exact = reference(*heads(sum(lengths)), lengths, None)
    narrow = heads(sum(lengths), torch.bfloat16)
    errors = [
        (result.float() - exact).norm() for result in (packed(*narrow, lengths), reference(*narrow, lengths, None))
    ]
    assert packed(*narrow, lengths).dtype is torch.bfloat16
    assert errors[0] <= 1.5 * errors[1]


def test_packed_attention_casts_float32_queries_and_keys_to_the_values_dtype():
    lengths = LENGTHS["short"]
    query, key, value = heads(sum(lengths), torch.bfloat16)
    assert packed(query.float(), key.float(), value, lengths).dtype is torch.bfloat16


@pytest.mark.parametrize("more", [{"dropout": 0.1}, {"softcap": 30.0}, {"s_aux": torch.zeros(4)}], ids=str)
def test_packed_attention_refuses_unsupported_arguments(more: dict[str, Any]):
    with pytest.raises(NotImplementedError):
        packed(*heads(15), [5, 1, 9], **more)


def test_example_bounds_of_three_examples():
    assert example_bounds(positions([5, 1, 9])).tolist() == [[[[0, 5, 6, 15], [0, 0, 0, 0]]]]


BRANCHING = {
    "two with one prefix": [(0, 9), (4, 7)],
    "nested prefixes": [(0, 12), (3, 9), (7, 8), (2, 6), (0, 5), (4, 6)],
    "many answers": [(0, 30), *((25, 25 + count) for count in (9, 1, 40, 3, BLOCK - 9, 7, 2, 30)), (0, 4), (0, 5)],
    "long": [(0, 2 * BLOCK + 9), (BLOCK + 5, 3 * BLOCK), (2 * BLOCK, 2 * BLOCK + 40), (0, 20), (1, BLOCK * 2)],
}
"""The prefix length and the length of each example."""


def shared_prefix_row(branches: list[tuple[int, int]]) -> tuple[Tensor, list[list[int]]]:
    """The positions of the row, and for each example the indices of all its tokens."""
    line, seen = [], []
    for first, length in branches:
        own = range(len(line), len(line) + length - first)
        seen.append([*(seen[-1][:first] if seen else []), *own])
        line += range(first, length)
    return torch.tensor([line]), seen


@pytest.mark.parametrize("window", [None, 4, BLOCK + 5])
@pytest.mark.parametrize("branches", BRANCHING.values(), ids=BRANCHING)
def test_shared_prefix_attention_matches_separate_examples(branches: list[tuple[int, int]], window: int | None):
    line, seen = shared_prefix_row(branches)
    places = torch.tensor([place for example in seen for place in example])
    found, expected = heads(line.shape[1]), heads(line.shape[1])
    mask = example_bounds(line)
    one = packed_attention.packed_attention(SimpleNamespace(), *found, mask, scaling=0.3, sliding_window=window)[0]
    apart = [tensor.index_select(2, places) for tensor in expected]
    other = reference(*apart, [len(example) for example in seen], window)
    assert torch.allclose(one.index_select(1, places), other, atol=1e-5)
    # The loss is over each example's own tokens; the tokens of a shared prefix count for its first example.
    weights = torch.randn(one.shape, generator=torch.Generator().manual_seed(1))
    ends = torch.tensor([len(example) for example in seen]).cumsum(0)
    own = torch.cat(
        [torch.arange(end - (length - first), end) for end, (first, length) in zip(ends, branches, strict=True)]
    )
    (one * weights).sum().backward()
    (other.index_select(1, own) * weights).sum().backward()
    for mine, apart_grad in zip(found, expected, strict=True):
        assert torch.allclose(mine.grad, apart_grad.grad, atol=1e-4)


def test_shared_prefix_attention_in_16_bits_is_as_accurate_as_reference():
    line, seen = shared_prefix_row(BRANCHING["long"])
    places, lengths = torch.tensor([place for example in seen for place in example]), [len(each) for each in seen]
    exact = reference(*(tensor.index_select(2, places) for tensor in heads(line.shape[1])), lengths, None)
    narrow = heads(line.shape[1], torch.bfloat16)
    one, _ = packed_attention.packed_attention(SimpleNamespace(), *narrow, example_bounds(line), scaling=0.3)
    other = reference(*(tensor.index_select(2, places) for tensor in narrow), lengths, None)
    assert one.dtype is torch.bfloat16
    errors = [(result.float() - exact).norm() for result in (one.index_select(1, places), other)]
    assert errors[0] <= 1.5 * errors[1]


def test_short_segments_with_the_same_prefix_are_merged():
    line, _ = shared_prefix_row(BRANCHING["many answers"])
    starts, prefix_lengths = (tuple(row) for row in example_bounds(line)[0, 0].tolist())
    found = [segment.branch_lengths for segment in packed_attention._merged_segments(starts, prefix_lengths, None)]
    assert found == [(30,), (9, 1, 40, 3), (BLOCK - 9, 7, 2), (30,), (4, 5)]
    assert all(sum(branches) <= BLOCK for branches in found)
    hidden = packed_attention._merged_segments(starts, prefix_lengths, 30)  # a window of 30 hides keys of all but two
    assert [len(segment.branch_lengths) for segment in hidden] == [1] * 9 + [2]


@pytest.mark.parametrize("branches", ["nested prefixes", "many answers"])
def test_shared_prefix_example_sees_only_its_prefix_and_itself(branches: str):
    line, seen = shared_prefix_row(BRANCHING[branches])
    query, key, value = (tensor.detach() for tensor in heads(line.shape[1]))
    for number, example in enumerate(seen):
        others = torch.ones(line.shape[1], dtype=torch.bool)
        others[example] = False
        changed = torch.where(others[:, None], torch.full_like(value, 1e6), value)
        one, other = (
            packed_attention.packed_attention(SimpleNamespace(), query, key, values, example_bounds(line))[0]
            for values in (value, changed)
        )
        assert torch.equal(one[:, example], other[:, example]), number

"""Packed attention on CUDA, by the op below `varlen_attn`: its arguments and its results."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.models.kernels import packed_attention
from finetune.models.kernels.packed_attention import example_bounds
from finetune.models.kernels.packing_check import use_packing_attention
from tests.fixtures.flash_op import flash_attention_on_cpu
from tests.fixtures.tiny import tiny_llama

EXAMPLES = {
    "apart": [(0, 5), (0, 1), (0, 9)],
    "shared prefix": [(0, 12), (3, 9), (7, 8), (2, 6), (0, 5), (4, 6)],
}
"""The prefix length and the length of each example."""

COMMON = (
    "Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, SymInt max_k, "
    "float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, SymInt? window_size_left=None, "
    "SymInt? window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None"
)
SCHEMAS = {
    "2.10.0": COMMON,
    "2.11.0": COMMON,
    "2.12.0": COMMON + ", Tensor? block_table=None, int? num_splits=None",
    "2.14.0": COMMON + ", Tensor? block_table=None, int? num_splits=None",
}
"""Arguments of `_flash_attention_forward` in the native_functions.yaml of each version's wheel."""

RESULTS = "(Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)"


def attention(examples: list[tuple[int, int]], window: int | None, head_dim: int = 16) -> list[Tensor]:
    """Output and gradients of query, key and value: 4 heads over 2 of keys."""
    positions = torch.cat([torch.arange(first, length) for first, length in examples])[None]
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, positions.shape[1], head_dim) for count in (4, 2, 2)]
    given = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    output, _ = packed_attention.packed_attention(
        SimpleNamespace(), *given, example_bounds(positions), scaling=0.3, sliding_window=window
    )
    (output * torch.randn(output.shape, generator=generator)).sum().backward()
    return [output.detach(), *(tensor.grad for tensor in given)]


@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("examples", EXAMPLES.values(), ids=EXAMPLES)
def test_flash_attention_matches_the_cpu_kernel_in_output_and_gradients(
    examples: list[tuple[int, int]], window: int | None, monkeypatch: pytest.MonkeyPatch
):
    expected = attention(examples, window)
    monkeypatch.setattr(packed_attention, "uses_flash", lambda query: True)
    with flash_attention_on_cpu():
        found = attention(examples, window)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_flash_attention_comparison_detects_another_window(monkeypatch: pytest.MonkeyPatch):
    """The control."""
    expected = attention(EXAMPLES["apart"], 4)
    monkeypatch.setattr(packed_attention, "uses_flash", lambda query: True)
    with flash_attention_on_cpu():
        found = attention(EXAMPLES["apart"], 5)
    assert not torch.allclose(found[0], expected[0], atol=1e-3)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("version", SCHEMAS)
def test_flash_attention_call_fits_the_schema_of_each_supported_version(
    version: str, window: int | None, monkeypatch: pytest.MonkeyPatch
):
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        calls.append((args, kwargs))
        return (args[0] + 0 * (args[1].sum() + args[2].sum()),)

    monkeypatch.setattr(packed_attention, "uses_flash", lambda query: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", record)
    attention(EXAMPLES["shared prefix"], window)
    (args, kwargs), *_ = calls
    schema = torch._C.parse_schema(f"aten::_flash_attention_forward({SCHEMAS[version]}) -> {RESULTS}")
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    keywords = {argument.name for argument in schema.arguments if argument.kwarg_only}
    assert len(args) == len(positional)
    assert kwargs.keys() <= keywords


def test_flash_attention_schema_of_the_installed_version_is_as_listed():
    installed = str(torch.ops.aten._flash_attention_forward.default._schema)
    assert installed.startswith(f"aten::_flash_attention_forward({COMMON}")


@pytest.mark.parametrize("head_dim", [20, 264])
def test_flash_attention_refuses_head_dims_without_a_backward_kernel(head_dim: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packed_attention, "uses_flash", lambda query: True)
    with flash_attention_on_cpu(), pytest.raises(NotImplementedError, match=str(head_dim)):
        attention(EXAMPLES["apart"], None, head_dim)


def test_model_with_an_unsupported_head_dim_falls_back_to_its_own_attention(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packed_attention, "uses_flash", lambda query: True)
    with flash_attention_on_cpu():
        odd, even = tiny_llama(head_dim=20), tiny_llama(head_dim=24)
        for model in (odd, even):
            use_packing_attention(model, may_choose=True)
    assert odd.config._attn_implementation == "sdpa"
    assert even.config._attn_implementation == packed_attention.NAME

"""FLOPs of traced passes, against a count by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from finetune.data.collate import Batch, flattened, padded
from finetune.data.encode import Example
from finetune.plan.footprint import passes
from finetune.plan.speed import PassFlops
from finetune.resolve import build
from tests.unit.plan.test_footprint import Adapter, inputs, section

TOKENS, TARGETS, BLOCKS, WIDTH, INNER, VOCABULARY, RANK = 96, 40, 2, 64, 160, 500, 4
KV_WIDTH = 32
LAYERS = {
    "q_proj": (WIDTH, WIDTH),
    "k_proj": (WIDTH, KV_WIDTH),
    "v_proj": (WIDTH, KV_WIDTH),
    "o_proj": (WIDTH, WIDTH),
    "gate_proj": (WIDTH, INNER),
    "up_proj": (WIDTH, INNER),
    "down_proj": (INNER, WIDTH),
}
"""Inputs and outputs of a block's linear layers."""

FIRST_OF_BLOCK = ("q_proj", "k_proj", "v_proj")
WEIGHTS = sum(into * out for into, out in LAYERS.values())
FACTORS = sum(RANK * (into + out) for into, out in LAYERS.values())
MATMUL_OF_SCORES = 2 * TOKENS * TOKENS * WIDTH  # T x D times D x T in each head, which have WIDTH / D heads together
HEAD = 2 * TARGETS * WIDTH * VOCABULARY


def row(tokens: int = TOKENS) -> Example:
    return Example(list(range(1, tokens + 1)), [place >= tokens - TARGETS for place in range(tokens)])


def llama(blocks: int = BLOCKS) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )


def traced(batch: Batch, adapter: dict[str, Any], blocks: int = BLOCKS, **changes: Any) -> PassFlops:
    return passes(inputs(llama(blocks), method=build(section(Adapter, **adapter)), **changes), batch, None).flops


ATTENTION = (2 + 5) * MATMUL_OF_SCORES
"""FLOPs of a block's attention: QK^T and PV forward; QK^T again, dP, dV, dQ and dK backward."""


def lora_forward() -> int:
    return 2 * TOKENS * (WEIGHTS + FACTORS)


def lora_backward(is_first_block: bool) -> int:
    """Gradients of inputs through frozen weights and factors, and of the factors; none of frozen weights.

    The embeddings are frozen, so the first block's input needs no gradient.
    """
    # dA = dz^T x and dB = dy^T z; dz = dy B for both.
    flops = 2 * TOKENS * sum(RANK * (into + 2 * out) for into, out in LAYERS.values())
    for name, (into, out) in LAYERS.items():
        if not (is_first_block and name in FIRST_OF_BLOCK):
            flops += 2 * TOKENS * (into * out + RANK * into)
    return flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [flattened([row()]), padded([row()], 0)], ids=["packed", "padded"])
def test_flops_of_lora_equal_a_count_by_hand(batch: Batch, dtype: torch.dtype):
    found = traced(batch, {"method": "lora", "r": RANK}, weight_dtype=dtype, compute_dtype=dtype)
    blocks = BLOCKS * (lora_forward() + ATTENTION) + lora_backward(True) + lora_backward(False)
    assert found.body == blocks
    assert found.head == 2 * HEAD  # forward, and the gradient of its input


def test_flops_of_full_fine_tuning_are_three_times_the_forward_pass():
    found = traced(flattened([row()]), {"method": "full"})
    # The embeddings are trainable, so each input has a gradient.
    assert found.body == BLOCKS * (3 * 2 * TOKENS * WEIGHTS + ATTENTION)
    assert found.head == 3 * HEAD


def test_flops_with_gradient_checkpointing_include_a_second_forward_pass():
    plain, recomputing = (
        traced(flattened([row()]), {"method": "lora", "r": RANK}, checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    # PEFT gives the embeddings' output a gradient where blocks are checkpointed, so the first block's input has one.
    first_input = lora_backward(is_first_block=False) - lora_backward(is_first_block=True)
    assert recomputing.body - plain.body == BLOCKS * (lora_forward() + 2 * MATMUL_OF_SCORES) + first_input
    assert recomputing.head == plain.head


def test_flops_of_many_blocks_extend_linearly():
    three, four, eight = (traced(flattened([row()]), {"method": "lora", "r": RANK}, blocks) for blocks in (3, 4, 8))
    assert eight.body - three.body == 5 * (four.body - three.body)
    assert eight.head == three.head


def test_flops_of_packed_examples_exclude_attention_between_them():
    both, single = (traced(flattened(rows), {"method": "lora", "r": RANK}) for rows in ([row(), row()], [row()]))
    assert both.body == 2 * single.body


def test_flops_of_a_run_scale_by_tokens_and_target_tokens():
    assert PassFlops(100, 10).scaled(tokens=3, targets=5) == 350

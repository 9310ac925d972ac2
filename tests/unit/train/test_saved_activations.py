"""Activations that each method saves for backward, in bytes per token, against a formula.

The memory of a step is this times its tokens; an accidental copy of an activation fails here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from torch import nn

from finetune.data.collate import flattened
from finetune.data.encode import Example
from finetune.models.kernels.fused import fuse
from finetune.models.kernels.packing_check import use_packing_attention
from finetune.models.kernels.selective_checkpointing import recompute_outputs, up_projections
from finetune.recipe.sections.adapter import Adapter
from finetune.resolve import build
from finetune.train.loss import summed_cross_entropy
from tests.fixtures.saved_bytes import saved_bytes
from tests.fixtures.tiny import tiny_llama
from tests.unit.quantizers.loading import PACKED, load

WIDTH, KEYS, INNER, LAYERS = 64, 32, 128, 2

ONE_COPY = 4 * (
    LAYERS
    * (
        2 * WIDTH  # inputs of the two norms
        + WIDTH + 2 * KEYS  # queries, keys, values
        + WIDTH  # output of attention
        + 2 * INNER  # gate and up
    )
    + WIDTH  # input of the last norm
    + WIDTH // 2  # the gradient of the head's input, at the half of positions with targets
)  # fmt: skip
"""Bytes per token of one float32 copy of each activation that plain LoRA needs and does not recompute."""

GATES = 4 * LAYERS * 2 * INNER
"""Bytes of gate and up among them."""

KINDS: dict[str, tuple[dict[str, Any], str | None, float]] = {
    "lora": ({"method": "lora", "r": 4}, None, 1.09),
    "dora": (
        {"method": "lora", "r": 4, "dora": True},
        None,
        1.91,
    ),  # and the output of every matmul, for the gradient of the magnitude
    "pissa": ({"method": "lora", "r": 4, "initialization": "pissa"}, None, 1.13),
    "qlora": ({"method": "lora", "r": 4}, "nf4", 1.09),
    "modulora": ({"method": "lora", "r": 4}, "optq-3", 1.09),
    "ir-qlora": ({"method": "lora", "r": 4, "iec": True}, "icq-4", 1.09),
    "qa-lora": ({"method": "qa_lora", "r": 4}, "affine-4", 0.96),  # group sums instead of inputs
    "adalora": ({"method": "adalora", "r": 6, "target_r": 4, "initial_steps": 1, "final_steps": 1}, None, 1.11),
    "ia3": ({"method": "ia3"}, None, 0.99),
    "full": ({"method": "full"}, None, 1.04),
}


def per_token(kind: str, folder: Path, *, plain: bool = False, selective: bool = False) -> float:
    section, quantization, _ = KINDS[kind]
    base = tiny_llama() if quantization is None else load(folder, PACKED[quantization])
    if not plain:
        fuse(base)
        use_packing_attention(base, may_choose=True)
    projections = up_projections(base)
    model = build(TypeAdapter(Adapter).validate_python(section), [], None).attach(base, 10).train()
    if selective:
        recompute_outputs(base, projections)
    return (kept(model, 6) - kept(model, 3)) / (3 * 40)


def kept(model: nn.Module, examples: int) -> int:
    trains = [position >= 20 for position in range(40)]
    batch = flattened(
        [Example([(7 * row + position) % 256 for position in range(40)], trains) for row in range(examples)]
    )
    summed_cross_entropy(model, batch)  # the probe of the head runs once
    return saved_bytes(lambda: summed_cross_entropy(model, batch))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_bytes_per_token_match_formula(kind: str, tiny_model: Path):
    copies = per_token(kind, tiny_model) / ONE_COPY
    assert copies <= KINDS[kind][2]
    assert copies > 0.9 * KINDS[kind][2]  # the bound is tight


@pytest.mark.parametrize("kind", KINDS)
def test_selective_checkpointing_saves_neither_gate_nor_up(kind: str, tiny_model: Path):
    assert per_token(kind, tiny_model) - per_token(kind, tiny_model, selective=True) == pytest.approx(GATES, rel=0.01)


def test_unfused_model_exceeds_formula(tiny_model: Path):
    """Control: the bound would detect it."""
    assert per_token("lora", tiny_model, plain=True) > 1.5 * ONE_COPY

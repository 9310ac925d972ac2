"""Adapter methods over the tiny model, with loss and gradients of a pass, to compare a path with its reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from finetune.data.collate import Batch, flattened, padded
from finetune.data.encode import Example
from finetune.models.kernels.packing_check import use_packing_attention
from finetune.recipe.sections.adapter import Adapter
from finetune.resolve import build
from finetune.train.loss import summed_cross_entropy
from tests.fixtures.tiny import tiny_llama
from tests.unit.quantizers.loading import PACKED, load

KINDS: dict[str, tuple[dict[str, Any], str | None]] = {
    "lora": ({"method": "lora", "r": 4}, None),
    "dora": ({"method": "lora", "r": 4, "dora": True}, None),
    "pissa": ({"method": "lora", "r": 4, "initialization": "pissa"}, None),
    "qlora": ({"method": "lora", "r": 4}, "nf4"),
    "modulora": ({"method": "lora", "r": 4}, "optq-3"),
    "ir-qlora": ({"method": "lora", "r": 4, "iec": True}, "icq-4"),
    "qa-lora": ({"method": "qa_lora", "r": 4}, "affine-4"),
    "adalora": ({"method": "adalora", "r": 6, "target_r": 4, "initial_steps": 1, "final_steps": 1}, None),
    "prompt": ({"method": "prompt_tuning", "tokens": 6}, None),
    "prefix": ({"method": "prefix_tuning", "tokens": 6}, None),
    "hqq": ({"method": "qa_lora", "r": 4}, "hqq-4"),
    "ia3": ({"method": "ia3"}, None),
    "vera": ({"method": "vera", "r": 16}, None),
    "loha": ({"method": "loha", "r": 2}, None),
    "lokr": ({"method": "lokr", "r": 2}, None),
    "oft": ({"method": "oft", "block_size": 8}, None),
    "full": ({"method": "full"}, None),
}
PROMPTS = ("prompt", "prefix")


def base_of(kind: str, folder: Path) -> PreTrainedModel:
    """The base of a method: quantized, for methods that need that."""
    quantization = KINDS[kind][1]
    return tiny_llama() if quantization is None else load(folder, PACKED[quantization])


def attached(kind: str, base: PreTrainedModel, folder: Path, **settings: Any) -> nn.Module:
    """The trainable model, with every trainable parameter away from its initial value; `settings` of its section."""
    if kind not in PROMPTS:
        use_packing_attention(base, may_choose=True)
    words = AutoTokenizer.from_pretrained(folder)
    section = TypeAdapter(Adapter).validate_python(KINDS[kind][0] | settings)
    torch.manual_seed(0)
    model = build(section, [], words).attach(base, 10).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def rows(kind: str, lengths: list[int]) -> Batch:
    """Rows of these lengths, as the method takes them."""
    examples = [
        Example([(7 * row + place) % 256 for place in range(length)], [place >= 5 for place in range(length)])
        for row, length in enumerate(lengths)
    ]
    return padded(examples, 0) if kind in PROMPTS else flattened(examples)


def outcome(model: nn.Module, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients."""
    loss = summed_cross_entropy(model, batch)
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return float(loss.detach()), gradients

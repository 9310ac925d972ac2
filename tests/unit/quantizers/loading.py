"""Shared by tests of quantizers: every kind of quantizer, and a model loaded with one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn
from transformers import PreTrainedModel

from finetune.data.collate import padded
from finetune.data.encode import Example
from finetune.models.calibration import quantize_by_inputs
from finetune.models.loading.load import load_model
from finetune.models.loading.model_files import ModelFolder
from finetune.models.loading.quantized_checkpoint import stored_quantization
from finetune.quantizers.choice import Quantizers
from finetune.recipe.sections.adapter import Lora
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.modules import ModuleRule
from finetune.recipe.sections.quantization import NoQuantization, Quantization, QuantizationSection
from finetune.resolve import build
from finetune.train.loss import summed_cross_entropy

ROW = Example(list(range(1, 25)), [False] * 8 + [True] * 16)


def section(**values: Any) -> QuantizationSection:
    return TypeAdapter(Quantization).validate_python(values)


# Quantizers that store codes and compute with exactly the dequantized weight.
PACKED = {
    "nf4": section(kind="nf4"),
    "nf4-single": section(kind="nf4", double_quant=False, block_size=128),
    "fp4": section(kind="fp4"),
    "affine-2": section(kind="affine", bits=2),
    "affine-3": section(kind="affine", bits=3),
    "affine-4": section(kind="affine"),
    "affine-8": section(kind="affine", bits=8, group_size=64, scale_dtype="float32", minimum_dtype="float32"),
    "hqq-2": section(kind="hqq", bits=2),
    "hqq-3": section(kind="hqq", bits=3, group_size=64),
    "hqq-4": section(kind="hqq"),
    "hqq-8": section(kind="hqq", bits=8),
    "optq-3": section(kind="optq", bits=3),
    "optq-4": section(kind="optq", minimum_dtype="float32"),
    "icq-2": section(kind="icq", bits=2, candidates=8),
    "icq-3": section(kind="icq", bits=3, candidates=8),
    "icq-4": section(kind="icq", candidates=8),
    "icq-single": section(kind="icq", candidates=8, double_quant=False),
}


PLAIN = NoQuantization()


def load(
    folder: Path,
    chosen: QuantizationSection = PLAIN,
    dtype: torch.dtype = torch.float32,
    rules: Sequence[ModuleRule] = (),
) -> PreTrainedModel:
    quantizers, model_folder = Quantizers(chosen, rules), ModelFolder(folder, str(folder))
    if quantizers.calibrated and not stored_quantization(model_folder):
        model = load(folder, dtype=dtype)
        quantize_by_inputs(model, quantizers, [ROW.ids], torch.device("cpu"))
        return model
    return load_model(
        model_folder,
        Model(name=str(folder)),
        quantizers,
        weight_dtype=dtype,
        compute_dtype=dtype,
        device=torch.device("cpu"),
    )


def with_lora(model: PreTrainedModel, r: int = 4) -> nn.Module:
    """A LoRA as after some training: B is not zero, so A has a gradient."""
    attached = build(Lora(method="lora", r=r)).attach(model, total_steps=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in attached.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return attached


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    summed_cross_entropy(model.train(), padded([ROW], 0)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([ROW.ids])).logits

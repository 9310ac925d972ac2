"""Quantized checkpoints: folders with packed weights, which load bit for bit without quantizing again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from finetune.errors import ModelError, UnsupportedError
from finetune.models.loading.model_files import ModelFolder
from finetune.quantizers.base import Quantizer, is_quantized
from finetune.quantizers.bits_and_bytes import CudaFourBitQuantizer
from finetune.quantizers.choice import Quantizers
from finetune.quantizers.layer import PackedQuantizer
from finetune.quantizers.on_load import METHOD, OnLoadConfig, OnLoadQuantizer, as_stored
from finetune.recipe.sections.quantization import QuantizationSection, StoredQuantization


def save_quantized(model: PreTrainedModel, folder: Path) -> None:
    """Write `model` with its packed weights as safetensors, and each layer's quantizer in config.json.

    Args:
        model: A quantized base without an adapter.
        folder: Where to write; without the tokenizer.

    Raises:
        UnsupportedError: No layer is quantized, or a layer's quantizer has no storage format (int8).
    """
    quantizers: dict[str, Quantizer] = {}
    for name, layer in list(model.named_modules()):
        if not is_quantized(layer):
            continue
        quantizer = layer.quantizer
        if isinstance(quantizer, CudaFourBitQuantizer):
            repacked: Any = quantizer.repacked(layer)
            repacked.stored_transposed = layer.stored_transposed
            model.set_submodule(name, repacked)
        else:
            check_storable([quantizer])
        quantizers[name] = quantizer
    if not quantizers:
        check_storable([])
    model.config.quantization_config = config_of(quantizers)
    model.hf_quantizer = OnLoadQuantizer(model.config.quantization_config)
    model.save_pretrained(folder)


def config_of(quantizers: Mapping[str, Quantizer]) -> OnLoadConfig:
    """The `quantization_config` for weights that are stored by these quantizers, given by the layers' names."""
    sections: list[QuantizationSection] = []
    for quantizer in quantizers.values():
        if quantizer.section not in sections:
            sections.append(quantizer.section)
    layers = {name: sections.index(quantizer.section) for name, quantizer in quantizers.items()}
    stored = StoredQuantization(quantizers=sections, layers=layers)  # type: ignore[arg-type]
    return OnLoadConfig(lambda name: None, torch.float32, stored)  # only written, never used to load


def check_storable(quantizers: Sequence[Quantizer]) -> None:
    """Check that `save_quantized` can write the layers of these quantizers.

    Raises:
        UnsupportedError: One has no storage format, or there are none.
    """
    hint = "quantize to affine, hqq, optq, nf4, fp4 or icq"
    if not quantizers:
        raise UnsupportedError("no layer of the model is quantized", where="quantization.kind", hint=hint)
    for quantizer in quantizers:
        if not isinstance(quantizer, PackedQuantizer | CudaFourBitQuantizer):
            what = f"weights in {quantizer.section.kind} have no storage format"
            raise UnsupportedError(what, where="quantization.kind", hint=hint)


def stored_quantization(folder: ModelFolder) -> StoredQuantization | None:
    """How the weights in a folder are quantized, if `ft` has stored them so; None otherwise.

    Raises:
        ModelError: The section in config.json is invalid.
    """
    config = folder.config().get("quantization_config")
    if not isinstance(config, dict) or config.get("quant_method") != METHOD:
        return None
    return as_stored(config)


def check_same_quantization(folder: ModelFolder, quantizers: Quantizers) -> None:
    """Check that a recipe sets the same quantization as stored weights have, or none.

    Raises:
        ModelError: It sets another one.
    """
    stored = stored_quantization(folder)
    if stored is None or quantizers.quantize_nothing:
        return
    if any(quantizers.section_of(name) != stored.quantizers[index] for name, index in stored.layers.items()):
        kinds = ", ".join(sorted({section.kind for section in stored.quantizers}))
        raise ModelError(
            f"the model's weights are already quantized, to {kinds}, and not as the recipe says",
            where=str(folder.path),
            hint="remove quantization from the recipe, or name the unquantized model",
        )

"""A folder that holds a model's quantized weights: written once, loaded bit for bit, without quantizing again."""

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
    """Write `model` with its packed weights: safetensors, and in config.json each layer's quantizer.

    Args:
        model: A base whose layers are quantized, while it loaded or by calibration, without an adapter.
        folder: Where to write; the tokenizer is not part of it.

    Raises:
        UnsupportedError: No layer is quantized, or one in a way that has no form on disk (int8).
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
            refuse_without_form_on_disk([quantizer])
        quantizers[name] = quantizer
    if not quantizers:
        refuse_without_form_on_disk([])
    model.config.quantization_config = config_of(quantizers)
    model.hf_quantizer = OnLoadQuantizer(model.config.quantization_config)
    model.save_pretrained(folder)


def config_of(quantizers: Mapping[str, Quantizer]) -> OnLoadConfig:
    """What config.json says of weights that are stored by these quantizers, given by the layers' names."""
    sections: list[QuantizationSection] = []
    for quantizer in quantizers.values():
        if quantizer.section not in sections:
            sections.append(quantizer.section)
    layers = {name: sections.index(quantizer.section) for name, quantizer in quantizers.items()}
    stored = StoredQuantization(quantizers=sections, layers=layers)  # type: ignore[arg-type]
    return OnLoadConfig(lambda name: None, torch.float32, stored)  # it is written, and loads nothing


def refuse_without_form_on_disk(quantizers: Sequence[Quantizer]) -> None:
    """Stop where `save_quantized` could not write layers that these have made.

    Raises:
        UnsupportedError: One has no form on disk, or there are none.
    """
    hint = "quantize to affine, hqq, optq, nf4, fp4 or icq"
    if not quantizers:
        raise UnsupportedError("no layer of the model is quantized", where="quantization.kind", hint=hint)
    for quantizer in quantizers:
        if not isinstance(quantizer, PackedQuantizer | CudaFourBitQuantizer):
            what = f"weights in {quantizer.section.kind} have no form on disk"
            raise UnsupportedError(what, where="quantization.kind", hint=hint)


def stored_quantization(folder: ModelFolder) -> StoredQuantization | None:
    """How the weights in a folder are quantized already, by us; None if they are not.

    Raises:
        ModelError: config.json says it in a way that is not ours.
    """
    config = folder.config().get("quantization_config")
    if not isinstance(config, dict) or config.get("quant_method") != METHOD:
        return None
    return as_stored(config)


def refuse_other_quantization(folder: ModelFolder, quantizers: Quantizers) -> None:
    """Weights that are quantized already stay so: the recipe must ask for the same, or for nothing.

    Raises:
        ModelError: It asks for something else.
    """
    stored = stored_quantization(folder)
    if stored is None or quantizers.quantize_nothing:
        return
    if any(quantizers.section_of(name) != stored.quantizers[index] for name, index in stored.layers.items()):
        kinds = ", ".join(sorted({section.kind for section in stored.quantizers}))
        raise ModelError(
            f"the model's weights are quantized already, to {kinds}, and not as the recipe says",
            where=str(folder.path),
            hint="leave quantization out, or name the unquantized model",
        )

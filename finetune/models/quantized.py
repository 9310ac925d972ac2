"""A folder that holds a model's quantized weights: written once, loaded bit for bit, without quantizing again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from finetune.errors import ModelError, UnsupportedError
from finetune.models.folder import ModelFolder
from finetune.quantizers.base import Quantizer, is_quantized
from finetune.quantizers.bits_and_bytes import CudaFourBitQuantizer
from finetune.quantizers.full_precision import FullPrecision
from finetune.quantizers.layer import PackedQuantizer
from finetune.quantizers.on_load import METHOD, OnLoadConfig, OnLoadQuantizer, as_stored
from finetune.recipe.quantization import QuantizationSection, StoredQuantization


def save_quantized(model: PreTrainedModel, folder: Path) -> None:
    """Write `model` with its packed weights: safetensors, and in config.json each layer's quantizer.

    Args:
        model: A base whose layers are quantized, while it loaded or by calibration, without an adapter.
        folder: Where to write; the tokenizer is not part of it.

    Raises:
        UnsupportedError: No layer is quantized, or one in a way that has no form on disk (int8).
    """
    sections: list[QuantizationSection] = []
    layers: dict[str, int] = {}
    for name, layer in list(model.named_modules()):
        if not is_quantized(layer):
            continue
        quantizer = layer.quantizer
        if isinstance(quantizer, CudaFourBitQuantizer):
            repacked: Any = quantizer.repacked(layer)
            repacked.stored_transposed = layer.stored_transposed
            model.set_submodule(name, repacked)
        else:
            refuse_without_form_on_disk(quantizer)
        if quantizer.section not in sections:
            sections.append(quantizer.section)
        layers[name] = sections.index(quantizer.section)
    if not layers:
        raise UnsupportedError(
            "no layer of the model is quantized", where="quantization", hint="choose a kind other than none"
        )
    stored = StoredQuantization(quantizers=sections, layers=layers)  # type: ignore[arg-type]
    config = OnLoadConfig(lambda name: None, torch.float32, stored)  # it is written, and loads nothing
    model.hf_quantizer = OnLoadQuantizer(config)
    model.config.quantization_config = config
    model.save_pretrained(folder)


def refuse_without_form_on_disk(quantizer: Quantizer) -> None:
    """Stop where `save_quantized` could not write the quantizer's layers.

    Raises:
        UnsupportedError: With kinds that have a form on disk.
    """
    if isinstance(quantizer, FullPrecision):
        what = "without quantization there is nothing to write"
    elif isinstance(quantizer, PackedQuantizer | CudaFourBitQuantizer):
        return
    else:
        what = f"weights in {quantizer.section.kind} have no form on disk"
    raise UnsupportedError(what, where="quantization.kind", hint="quantize to affine, hqq, optq, nf4, fp4 or icq")


def is_quantized_folder(folder: ModelFolder) -> bool:
    """Whether the folder holds quantized weights of ours."""
    config = folder.config().get("quantization_config")
    return isinstance(config, dict) and config.get("quant_method") == METHOD


def stored_options(folder: ModelFolder, quantizer: Quantizer) -> dict[str, Any] | None:
    """Arguments for `from_pretrained` if the folder holds quantized weights of ours, else None.

    Args:
        folder: Of the model.
        quantizer: The recipe's; it must be the folder's, or none.

    Raises:
        ModelError: config.json is not ours, or the recipe asks for another quantizer.
    """
    if not is_quantized_folder(folder):
        return None
    stored = as_stored(folder.config()["quantization_config"])
    kinds = ", ".join(sorted({section.kind for section in stored.quantizers}))
    asked = quantizer.section
    if not isinstance(quantizer, FullPrecision) and any(section != asked for section in stored.quantizers):
        raise ModelError(
            f"the model's weights are quantized already, to {kinds}, and not as the recipe says",
            where=str(folder.path),
            hint="leave quantization out, or name the unquantized model",
        )
    return {}

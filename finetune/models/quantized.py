"""A folder that holds a model's quantized weights: written once, loaded bit for bit, without quantizing again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from finetune.errors import ModelError, UnsupportedError
from finetune.models.folder import ModelFolder
from finetune.quantizers.base import Quantizer, is_quantized
from finetune.quantizers.bits_and_bytes import CudaFourBitQuantizer
from finetune.quantizers.full_precision import FullPrecision
from finetune.quantizers.layer import QuantizedLinear
from finetune.quantizers.on_load import METHOD, as_stored
from finetune.recipe.quantization import QuantizationSection, StoredQuantization


def save_quantized(model: PreTrainedModel, folder: Path) -> None:
    """Write `model` with its packed weights: safetensors, and in config.json each layer's quantizer.

    Args:
        model: A base whose layers were quantized while it loaded, without an adapter.
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
        elif not isinstance(layer, QuantizedLinear):
            raise UnsupportedError(
                f"weights in {quantizer.section.kind} have no form on disk",
                where="quantization.kind",
                hint="quantize to affine, hqq, nf4, fp4 or icq",
            )
        if quantizer.section not in sections:
            sections.append(quantizer.section)
        layers[name] = sections.index(quantizer.section)
    if not layers:
        raise UnsupportedError(
            "no layer of the model is quantized", where="quantization", hint="choose a kind other than none"
        )
    stored = StoredQuantization(quantizers=sections, layers=layers)  # type: ignore[arg-type]
    model.hf_quantizer.quantization_config.stored = stored
    model.config.quantization_config = model.hf_quantizer.quantization_config
    model.save_pretrained(folder)


def stored_options(folder: ModelFolder, quantizer: Quantizer) -> dict[str, Any] | None:
    """Arguments for `from_pretrained` if the folder holds quantized weights of ours, else None.

    Args:
        folder: Of the model.
        quantizer: The recipe's; it must be the folder's, or none.

    Raises:
        ModelError: config.json is not ours, or the recipe asks for another quantizer.
    """
    config = folder.config().get("quantization_config")
    if not isinstance(config, dict) or config.get("quant_method") != METHOD:
        return None
    stored = as_stored(config)
    kinds = ", ".join(sorted({section.kind for section in stored.quantizers}))
    asked = quantizer.section
    if not isinstance(quantizer, FullPrecision) and any(section != asked for section in stored.quantizers):
        raise ModelError(
            f"the model's weights are quantized already, to {kinds}, and not as the recipe says",
            where=str(folder.path),
            hint="leave quantization out, or name the unquantized model",
        )
    return {}

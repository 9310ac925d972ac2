"""PEFT as the runtime of adapters: the one place that knows its API."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from finetune.errors import ModelError, RefusedError, UnsupportedError

ADAPTER_NAME = "default"


def attach(model: PreTrainedModel, config: LoraConfig, targets: str | list[str]) -> PeftModel:
    """Wrap the target layers of `model`; the adapter's weights are float32 and train, all others are frozen.

    Raises:
        UnsupportedError: No layer of the model has such a name.
    """
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = _bitsandbytes_kinds(model)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        if "Target modules" not in str(error):
            raise
        endings = sorted({name.rpartition(".")[2] for name, layer in model.named_modules() if _is_linear(layer)})
        raise UnsupportedError(
            f"no layer of the model matches {targets}",
            where="adapter.target_modules",
            hint=f"its linear layers end in: {', '.join(endings)}",
        ) from error


def save(model: PeftModel, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, as stock PEFT reads them.

    The vocabulary is never resized, so embeddings are never saved; PEFT would ask the hub to find out.
    """
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template of a model card, with nothing filled in


def load(model: PreTrainedModel, config: LoraConfig, folder: Path) -> PeftModel:
    """Attach an adapter from disk, frozen; every one of its tensors must find its place.

    Raises:
        RefusedError: The adapter's tensors are not those of this base and recipe.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError("no adapter_model.safetensors", where=str(folder), hint="the run has not finished: train it")
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = _bitsandbytes_kinds(model)
    config.inference_mode = True
    wrapped = get_peft_model(model, config)
    try:
        outcome = wrapped.load_adapter(str(folder), ADAPTER_NAME, is_trainable=False)
    except RuntimeError as error:  # PyTorch's word for tensors of another shape
        raise RefusedError(
            "the adapter's tensors have other shapes than this base's layers",
            where=str(folder),
            hint="load the base that it was trained on",
        ) from error
    strangers = [*outcome.unexpected_keys, *(key for key in outcome.missing_keys if "lora_" in key)]
    if strangers:
        raise RefusedError(
            f"{len(strangers)} adapter tensors do not fit this base, {strangers[0]} among them",
            where=str(folder),
            hint="load the base that it was trained on",
        )
    wrapped.requires_grad_(False)
    return wrapped


def merge(model: PeftModel) -> PreTrainedModel:
    """Add each update to its layer's weight and drop the adapter; refuses numbers that are not finite."""
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise RefusedError(
            f"the adapter cannot be merged: {error}", hint="its weights are damaged: train it"
        ) from error


def _bitsandbytes_kinds(model: nn.Module) -> tuple[bool, bool]:
    """Whether layers are 4-bit or 8-bit ones of bitsandbytes: PEFT picks its layer class by these flags."""
    kinds = {type(layer).__name__ for layer in model.modules()}
    return "Linear4bit" in kinds, "Linear8bitLt" in kinds


def _is_linear(layer: nn.Module) -> bool:
    return hasattr(layer, "in_features") or type(layer).__name__ == "Conv1D"

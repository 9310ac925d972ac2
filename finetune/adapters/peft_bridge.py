"""PEFT as the runtime of adapters: the one place that knows its API."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.adapters.low_rank import LowRankLinear
from finetune.errors import ModelError, RefusedError, UnsupportedError
from finetune.models.fsdp import unsharded_non_block
from finetune.models.linear_layers import linear_layers
from finetune.models.safetensors_io import unaliased

ADAPTER_NAME = "default"

NO_LAYER_FOUND = ("Target modules", "No layers types compatible")
"""Words of PEFT's errors where no layer has the name of a target."""

PREFIX = "base_model.model."
"""What PEFT puts before the names of a wrapped model's layers."""

STOCK_WEIGHTS = "adapter_model.safetensors"
NATIVE_WEIGHTS = "ft_adapter.safetensors"
"""The trained tensors themselves, where the stock file holds what they amount to."""

PROMPT = "prompt_embeddings"
"""PEFT's name of a soft prompt, whichever kind it is."""


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The layers with a low-rank update, by the names that they have in the base."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankLinear)}
    return {name.removeprefix(PREFIX): layer for name, layer in layers.items()}


def as_targets(targets: str | Sequence[str]) -> str | list[str]:
    """Target modules as PEFT takes them: it changes lists."""
    return targets if isinstance(targets, str) else list(targets)


def attach(model: PreTrainedModel, config: PeftConfig, targets: str | list[str]) -> PeftModel:
    """Wrap the target layers of `model`; the adapter's weights are float32 and train, all others are frozen.

    Raises:
        UnsupportedError: No layer of the model has such a name.
    """
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = _bitsandbytes_kinds(model)
    try:
        with unsharded_non_block(model):  # which may be copied, to train
            wrapped = get_peft_model(model, config)
    except ValueError as error:
        if not any(words in str(error) for words in NO_LAYER_FOUND):
            raise
        endings = sorted({name.rpartition(".")[2] for name in linear_layers(model)})
        raise UnsupportedError(
            f"no layer of the model matches {targets}",
            where="adapter.target_modules",
            hint=f"its linear layers end in: {', '.join(endings)}",
        ) from error
    for parameter in wrapped.parameters():  # of modules that train whole: updates are lost in 16 bits
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def token_ids(tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase | None, key: str) -> list[int]:
    """The ids of tokens.

    Raises:
        UnsupportedError: One of them is none of the vocabulary.
    """
    ids = []
    for token in tokens:
        assert tokenizer is not None
        pieces = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(pieces) != 1:
            raise UnsupportedError(
                f"{token!r} is not one token but {len(pieces)}",
                where=key,
                hint="name tokens of the vocabulary; those within words often begin with a space",
            )
        ids += pieces
    return ids


def load_initial_adapter(model: PeftModel, folder: Path) -> None:
    """Put saved tensors into an adapter that trains.

    Raises:
        ModelError: There are none.
        RefusedError: They are not those of this base and recipe.
    """
    _put(model, _native(folder))


def save(model: PeftModel, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, as stock PEFT reads them.

    The vocabulary is never resized, so embeddings are never saved; PEFT would ask the hub to find out.
    """
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template of a model card, with nothing filled in


@torch.no_grad()
def save_as_lora(model: PeftModel, config: LoraConfig, folder: Path, rank: int | None = None) -> None:
    """Write the plain LoRA that low-rank layers amount to, as stock PEFT reads it, and their own tensors beside it.

    Args:
        model: With an adapter of `LowRankLinear` layers.
        config: Of the plain LoRA.
        folder: Where to.
        rank: Fill every layer's factors up to this rank with zeros, and fold its scale into them: engines that serve
            adapters know only one rank and scale for all. By default both stay.
    """
    tensors = {name: tensor for name, tensor in _tensors(model).items() if "lora_" not in name}
    for name, layer in low_rank_layers(model).items():
        a_RI, b_OR = layer.factors(ADAPTER_NAME)
        if rank is not None:
            missing = rank - len(a_RI)
            a_RI, b_OR = pad(a_RI, (0, 0, 0, missing)), pad(b_OR * layer.scaling[ADAPTER_NAME], (0, missing))
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = a_RI, b_OR
    trains = model.peft_config[ADAPTER_NAME]
    config.target_modules, config.exclude_modules = trains.target_modules, trains.exclude_modules
    config.base_model_name_or_path, config.inference_mode = trains.base_model_name_or_path, True
    config.save_pretrained(folder)
    save_file(unaliased(tensors), folder / STOCK_WEIGHTS, metadata={"format": "pt"})
    save_file(unaliased(_tensors(model)), folder / NATIVE_WEIGHTS)


def stock_rank(folder: Path) -> int:
    """The rank of a plain LoRA that `save_as_lora` has given one rank.

    Raises:
        ModelError: There is none.
    """
    return min(len(tensor) for name, tensor in _read(folder / STOCK_WEIGHTS).items() if "lora_A" in name)


def load(model: PreTrainedModel, config: PeftConfig, folder: Path) -> PeftModel:
    """Attach an adapter from disk, frozen; every one of its tensors must find its place.

    Nothing but tensors is read: what the adapter is comes from the recipe.

    Raises:
        ModelError: There is none.
        RefusedError: The adapter's tensors are not those of this base and recipe.
    """
    return _load(model, config, _native(folder))


def load_stock(model: PreTrainedModel, config: PeftConfig, folder: Path) -> PeftModel:
    """Attach an adapter's stock form, each layer of which `fold` turns into an ordinary one.

    Raises:
        ModelError: There is none.
        RefusedError: The adapter's tensors are not those of this base and recipe.
    """
    return _load(model, config, folder / STOCK_WEIGHTS)


def fold(layer: nn.Module) -> nn.Module:
    """The layer of the base that PEFT has put something around, with what that does in its weights.

    Raises:
        RefusedError: What was trained is not finite.
    """
    try:
        if isinstance(layer, AuxiliaryTrainingWrapper):
            return layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        if isinstance(layer.base_layer, BaseTunerLayer):  # one layer around the other: experts have several weights
            fold(layer.base_layer)
        layer.merge(safe_merge=True)
        return layer.get_base_layer()
    except ValueError as error:
        raise RefusedError(
            f"the adapter cannot be merged: {error}", hint="its weights are damaged: train it"
        ) from error


def _load(model: PreTrainedModel, config: PeftConfig, file: Path) -> PeftModel:
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = _bitsandbytes_kinds(model)
    config.inference_mode = True
    wrapped = get_peft_model(model, config)
    for module in wrapped.modules():
        if isinstance(module, ModulesToSaveWrapper):  # over a base whose weights are not there, a copy has no memory
            for parameter in module.modules_to_save.parameters():
                parameter.data = parameter.data.contiguous()
    _put(wrapped, file)
    for layer in low_rank_layers(wrapped).values():
        layer.base_row_norms.clear()  # taken when the weights may not have been there
    wrapped.requires_grad_(False)
    return wrapped


def _native(folder: Path) -> Path:
    """The file of what was trained itself."""
    native = folder / NATIVE_WEIGHTS
    return native if native.is_file() else folder / STOCK_WEIGHTS


def _put(wrapped: PeftModel, file: Path) -> None:
    tensors = _read(file)
    strangers = sorted(tensors.keys() ^ _tensors(wrapped).keys())
    if strangers:
        raise RefusedError(
            f"{len(strangers)} tensors are only in the adapter or only in this base, {strangers[0]} among them",
            where=str(file),
            hint="load the base that it was trained on",
        )
    try:
        set_peft_model_state_dict(wrapped, tensors, ADAPTER_NAME)
    except RuntimeError as error:  # PyTorch's word for tensors of another shape
        raise RefusedError(
            "the adapter's tensors have other shapes than this base's layers",
            where=str(file),
            hint="load the base that it was trained on",
        ) from error


def save_prompt(prompt_PW: Tensor, config: PeftConfig, folder: Path) -> None:
    """Write a soft prompt of P places as stock PEFT reads it."""
    config.inference_mode = True
    config.save_pretrained(folder)
    save_file({PROMPT: prompt_PW.cpu().contiguous()}, folder / STOCK_WEIGHTS, metadata={"format": "pt"})


def load_prompt(folder: Path, shape: tuple[int, int]) -> Tensor:
    """A saved soft prompt of the shape (P, W), float32; as with `load`, nothing but tensors is read.

    Raises:
        ModelError: There is none.
        RefusedError: It is not one of this recipe and base.
    """
    file = folder / STOCK_WEIGHTS
    tensors = _read(file)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != {PROMPT: shape}:
        raise RefusedError(
            f"the file holds {found}, and the recipe's prompt before this base has the shape {shape}",
            where=str(file),
            hint="load the base that it was trained on",
        )
    return tensors[PROMPT].float()


def unload(model: PeftModel) -> PreTrainedModel:
    """The base without the adapter, which is dropped; modules that trained whole are those of the base again."""
    base = model.get_base_model()
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):  # PEFT would leave its trained copy there
            base.set_submodule(name, module.original_module)
    return model.unload()


def store_as_base(model: nn.Module) -> None:
    """Give modules that trained whole the type of the base's, as `load` does: outside of training nothing is cast."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.to(next(module.original_module.parameters()).dtype)


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ModelError(f"no {file.name}", where=str(file.parent), hint="the run has not finished: train it")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise RefusedError(
            f"the file is damaged: {error}", where=str(file), hint="train the run again, or bring back a good copy"
        ) from error


def _bitsandbytes_kinds(model: nn.Module) -> tuple[bool, bool]:
    """Whether layers are 4-bit or 8-bit ones of bitsandbytes: PEFT picks its layer class by these flags."""
    kinds = {type(layer).__name__ for layer in model.modules()}
    return "Linear4bit" in kinds, "Linear8bitLt" in kinds


def _tensors(model: PeftModel) -> dict[str, Tensor]:
    """What an adapter consists of, by the names that it is saved under."""
    return get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=False)

"""Adapter runtime on PEFT: the only module that calls PEFT's functions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TrainableTokensConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.adapters.low_rank import LowRankLinear
from finetune.adapters.targets import Targets, find_targets
from finetune.adapters.token_rows import token_modules, use_head_rows
from finetune.errors import ModelError, RefusedError, UnsupportedError
from finetune.models.fsdp import unsharded_non_block
from finetune.models.layer_names import endings, ends_with
from finetune.models.linear_layers import LayerKind, linear_layers, modules_with_weight
from finetune.models.loading.new_tokens import token_id
from finetune.models.safetensors_io import unaliased

ADAPTER_NAME = "default"

PREFIX = "base_model.model."
"""PEFT's prefix of layer names in a wrapped model."""

STOCK_WEIGHTS = "adapter_model.safetensors"
NATIVE_WEIGHTS = "ft_adapter.safetensors"
"""The native trained tensors, if the stock file holds an equivalent plain LoRA."""

PROMPT = "prompt_embeddings"
"""PEFT's tensor name of any soft prompt."""


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The layers with a low-rank update, by their names in the base."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankLinear)}
    return {name.removeprefix(PREFIX): layer for name, layer in layers.items()}


def adapted_embeddings(model: nn.Module) -> list[str]:
    """Names of the embeddings with a low-rank update, which is PEFT's own."""
    names = [name for name, layer in model.named_modules() if isinstance(layer, LoraEmbedding)]
    return [name.removeprefix(PREFIX) for name in names]


def as_targets(targets: str | Sequence[str]) -> str | list[str]:
    """Target modules for PEFT, as a copy: PEFT modifies lists."""
    return targets if isinstance(targets, str) else list(targets)


def attach(model: PreTrainedModel, config: PeftConfig, kinds: Collection[LayerKind] = ()) -> PeftModel:
    """Wrap the target layers of `model`; the adapter's weights are trainable and float32, all others frozen.

    Args:
        model: The base.
        config: PEFT's configuration, with names as the recipe has them; completed here.
        kinds: Kinds of layers that the method adapts; others of these names are left out.

    Raises:
        UnsupportedError: No layer of the model has such a name.
    """
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = _bitsandbytes_kinds(model)
    adapted: Collection[str] = ()
    if targets := getattr(config, "target_modules", None):
        found = find_targets(model, targets, kinds)
        if not found.adapted:
            raise UnsupportedError(
                f"no layer of the model matches {targets}",
                where="adapter.target_modules",
                hint=f"its linear layers end in: {', '.join(endings(linear_layers(model)))}",
            )
        _leave_out(config, found)
        adapted = found.adapted
    _place_token_rows(config, token_modules(model, adapted))
    if getattr(config, "modules_to_save", None):
        config.modules_to_save = _named_modules(model, config.modules_to_save, ends_with)
        _tie_saved(config, model)
    with unsharded_non_block(model):  # `modules_to_save` are copied, which needs full tensors
        wrapped = get_peft_model(model, config)
    use_head_rows(wrapped)
    for parameter in wrapped.parameters():  # of `modules_to_save`: in 16 bits small updates would round to nothing
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def expert_parameters(model: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    """Endings of the stacked weights of experts that PEFT's LoRA adapts for `target_modules`.

    PEFT maps the names of experts in checkpoints, and `all-linear`, to the 3-D parameters of transformers 5.

    Raises:
        UnsupportedError: The names are some of those that one fused weight stands for.
    """
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=as_targets(targets))
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError as error:
        raise UnsupportedError(str(error), where="adapter.target_modules", hint="name all of them, or none") from error
    return sorted(config.target_parameters or ())


def token_ids(tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase | None, key: str) -> list[int]:
    """The ids of tokens.

    Raises:
        UnsupportedError: A text is not a single token of the vocabulary.
    """
    ids = []
    for token in tokens:
        assert tokenizer is not None
        index = token_id(tokenizer, token)
        if index is None:
            raise UnsupportedError(
                f"{token!r} is not one token of the vocabulary",
                where=key,
                hint="name tokens of the vocabulary, many of which begin with a space; model.new_tokens adds others",
            )
        ids.append(index)
    return ids


def load_initial_adapter(model: PeftModel, folder: Path) -> None:
    """Copy saved tensors into a trainable adapter.

    Raises:
        ModelError: There are no saved tensors.
        RefusedError: They do not match this base and recipe.
    """
    _copy_tensors(model, _native(folder))


def save(model: PeftModel, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, as stock PEFT reads them.

    Embeddings are never saved as a whole: the rows of new tokens train, and are saved by themselves. PEFT would query
    the hub to find out whether the vocabulary has grown.
    """
    config = model.peft_config[ADAPTER_NAME]
    if hasattr(config, "modules_to_save"):
        config.modules_to_save = _saved_modules(config)
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT writes a model card template with empty fields


@torch.no_grad()
def save_as_lora(model: PeftModel, config: LoraConfig, folder: Path, rank: int | None = None) -> None:
    """Write the plain LoRA that is equivalent to the low-rank layers, for stock PEFT, and the native tensors beside it.

    Args:
        model: A model with an adapter of `LowRankLinear` layers.
        config: PEFT configuration of the plain LoRA.
        folder: Target folder.
        rank: Pad the factors of every layer to this rank with zeros and multiply its scale into B: engines that serve
            adapters support only a uniform rank and scale. By default rank and scale of each layer are kept.
    """
    # The rest of the adapter, modules_to_save and trainable tokens, is saved unchanged.
    tensors = {name: tensor for name, tensor in _tensors(model).items() if "lora_" not in name}
    for name, layer in low_rank_layers(model).items():
        a_RI, b_OR = layer.factors(ADAPTER_NAME)
        if rank is not None:
            missing = rank - len(a_RI)
            a_RI, b_OR = pad(a_RI, (0, 0, 0, missing)), pad(b_OR * layer.scaling[ADAPTER_NAME], (0, missing))
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = a_RI, b_OR
    trains = model.peft_config[ADAPTER_NAME]
    config.target_modules, config.exclude_modules = trains.target_modules, trains.exclude_modules
    config.modules_to_save, config.ensure_weight_tying = _saved_modules(trains), trains.ensure_weight_tying
    config.trainable_token_indices = trains.trainable_token_indices
    config.base_model_name_or_path, config.inference_mode = trains.base_model_name_or_path, True
    config.save_pretrained(folder)
    # safetensors refuses tensors that share memory, such as tied weights.
    save_file(unaliased(tensors), folder / STOCK_WEIGHTS, metadata={"format": "pt"})
    save_file(unaliased(_tensors(model)), folder / NATIVE_WEIGHTS)


def _saved_modules(config: PeftConfig) -> list[str] | None:
    """`modules_to_save` with the tied ones, which PEFT has removed; stock PEFT then ties them as well."""
    return (
        list(dict.fromkeys([*(config.modules_to_save or ()), *sorted(getattr(config, "modules_to_tie", None) or ())]))
        or None
    )


def stock_rank(folder: Path) -> int:
    """The rank of a plain LoRA that `save_as_lora` wrote with a uniform rank.

    Raises:
        ModelError: There is no adapter.
    """
    return min(len(tensor) for name, tensor in read_trained(folder / STOCK_WEIGHTS).items() if "lora_A" in name)


def load(model: PreTrainedModel, config: PeftConfig, folder: Path, kinds: Collection[LayerKind] = ()) -> PeftModel:
    """Attach an adapter from disk, frozen; its tensors must match the model one for one.

    Only tensors are read from the folder; the configuration comes from the recipe.

    Raises:
        ModelError: There is no adapter.
        RefusedError: Its tensors do not match this base and recipe.
    """
    return _load(model, config, _native(folder), kinds)


def load_stock(
    model: PreTrainedModel, config: PeftConfig, folder: Path, kinds: Collection[LayerKind] = ()
) -> PeftModel:
    """Attach an adapter in stock form, whose layers `merge_layer` can merge.

    Raises:
        ModelError: There is no adapter.
        RefusedError: Its tensors do not match this base and recipe.
    """
    return _load(model, config, folder / STOCK_WEIGHTS, kinds)


def merge_layer(layer: nn.Module) -> nn.Module:
    """Merge the adapter of a PEFT-wrapped layer into its weight; returns the base layer.

    Raises:
        RefusedError: The adapter has values that are not finite.
    """
    try:
        if isinstance(layer, AuxiliaryTrainingWrapper):
            return layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        if isinstance(
            layer.base_layer, BaseTunerLayer
        ):  # nested: a layer of experts has several weights, each with an adapter
            merge_layer(layer.base_layer)
        layer.merge(safe_merge=True)
        return layer.get_base_layer()
    except ValueError as error:
        raise RefusedError(
            f"the adapter cannot be merged: {error}", hint="its weights are damaged: train it"
        ) from error


def _load(model: PreTrainedModel, config: PeftConfig, file: Path, kinds: Collection[LayerKind]) -> PeftModel:
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = _bitsandbytes_kinds(model)
    _fit_to_tensors(config, model, read_trained(file), kinds)
    config.inference_mode = True
    wrapped = get_peft_model(model, config)
    use_head_rows(wrapped)
    for module in wrapped.modules():
        if isinstance(module, ModulesToSaveWrapper):  # a copy of a meta base has strides but no memory
            for parameter in module.modules_to_save.parameters():
                parameter.data = parameter.data.contiguous()
    _copy_tensors(wrapped, file)
    for layer in low_rank_layers(wrapped).values():
        # DoRA row norms were cached over meta or streamed weights in `get_peft_model`: recompute them at first use.
        layer.base_row_norms.clear()
    wrapped.requires_grad_(False)
    return wrapped


def _leave_out(config: PeftConfig, found: Targets) -> None:
    """Adapt only the layers that the method can adapt."""
    if not found.excluded:
        return
    if hasattr(config, "exclude_modules"):
        config.exclude_modules = [*(config.exclude_modules or ()), *found.excluded]
    else:
        config.target_modules = list(found.adapted)


def _fit_to_tensors(
    config: PeftConfig, model: PreTrainedModel, tensors: Mapping[str, Tensor], kinds: Collection[LayerKind]
) -> None:
    """Complete a configuration as it was when saved tensors were trained: an earlier version chose other layers."""
    modules = {name for name, _ in model.named_modules(remove_duplicate=False) if name}
    saved = {name for name in modules if any(tensor.startswith(f"{PREFIX}{name}.") for tensor in tensors)}
    if targets := getattr(config, "target_modules", None):
        found = find_targets(model, targets, kinds)
        _leave_out(config, Targets(found.adapted, {n: why for n, why in found.excluded.items() if n not in saved}))
    # Earlier versions trained the rows of the embeddings alone; a head with an update has no rows of its own.
    rows = [tensor for tensor in tensors if "trainable_tokens" in tensor]
    owners = token_modules(model)
    _place_token_rows(config, [name for name in owners if any(row.startswith(f"{PREFIX}{name}.") for row in rows)])
    if getattr(config, "modules_to_save", None):
        # PEFT's own match, which an earlier version used, is an ending anywhere in a name.
        matching = _named_modules(model, config.modules_to_save, str.endswith)
        config.modules_to_save = [name for name in matching if name in saved]
        _tie_saved(config, model, saved)


def _place_token_rows(config: PeftConfig, modules: Sequence[str]) -> None:
    """Have PEFT train the rows of single tokens in these modules; by default it does in the embeddings alone."""
    if len(modules) < 2:
        return
    if isinstance(config, TrainableTokensConfig):
        config.target_modules = list(modules)
    elif isinstance(ids := getattr(config, "trainable_token_indices", None), list):
        config.trainable_token_indices = dict.fromkeys(modules, ids)


def _named_modules(model: nn.Module, entries: Iterable[str], matches: Callable[[str, str], bool]) -> list[str]:
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    return [name for name in names if any(matches(name, entry) for entry in entries)]


def _tie_saved(config: PeftConfig, model: PreTrainedModel, trained: Collection[str] | None = None) -> None:
    """Have PEFT train one copy of tied embeddings and output head, if the recipe names one of them.

    PEFT ties no head with a bias, and only modules of certain names; elsewhere the named one trains, and a merge unties
    it from the other. It does not tie layers with updates here: it would tie their factors in float32 only.

    Args:
        config: With full names in `modules_to_save`; changed in place.
        model: The base.
        trained: Names of the modules that have trained, if they have.
    """
    tied = modules_with_weight(model, model.get_input_embeddings().weight)
    if trained is None:
        known = any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in tied)
        has_bias = any(getattr(model.get_submodule(name), "bias", None) is not None for name in tied)
        trained = tied if known and not has_bias else ()
    config.ensure_weight_tying = len({*tied} & {*trained}) > 1 and bool({*tied} & {*config.modules_to_save})
    if config.ensure_weight_tying:
        config.modules_to_save = list(dict.fromkeys([*config.modules_to_save, *tied]))


def _native(folder: Path) -> Path:
    """The file of the native trained tensors."""
    native = folder / NATIVE_WEIGHTS
    return native if native.is_file() else folder / STOCK_WEIGHTS


def _copy_tensors(wrapped: PeftModel, file: Path) -> None:
    tensors = read_trained(file)
    strangers = sorted(tensors.keys() ^ _tensors(wrapped).keys())
    if strangers:
        raise RefusedError(
            f"{len(strangers)} tensors are only in the adapter or only in this base, such as {strangers[0]}",
            where=str(file),
            hint="load the base that it was trained on",
        )
    try:
        set_peft_model_state_dict(wrapped, tensors, ADAPTER_NAME)
    except RuntimeError as error:  # PyTorch raises it for tensors of another shape
        raise RefusedError(
            "the adapter's tensors have other shapes than this base's layers",
            where=str(file),
            hint="load the base that it was trained on",
        ) from error


def save_prompt(prompt_PW: Tensor, config: PeftConfig, folder: Path) -> None:
    """Write a soft prompt, shape (P, W), as stock PEFT reads it."""
    config.inference_mode = True
    config.save_pretrained(folder)
    save_file({PROMPT: prompt_PW.cpu().contiguous()}, folder / STOCK_WEIGHTS, metadata={"format": "pt"})


def load_prompt(folder: Path, shape: tuple[int, int]) -> Tensor:
    """Read a soft prompt, shape (P, W), float32; as in `load`, only tensors are read.

    Raises:
        ModelError: There is no prompt.
        RefusedError: It does not match this recipe and base.
    """
    file = folder / STOCK_WEIGHTS
    tensors = read_trained(file)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != {PROMPT: shape}:
        raise RefusedError(
            f"the file holds {found}; the recipe and this base need a prompt of shape {shape}",
            where=str(file),
            hint="load the base that it was trained on",
        )
    return tensors[PROMPT].float()


def unload(model: PeftModel) -> PreTrainedModel:
    """The base without the adapter; `modules_to_save` are replaced by the original modules."""
    base = model.get_base_model()
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):  # PEFT would leave the trained copy
            base.set_submodule(name, module.original_module)
    return model.unload()


def store_as_base(model: nn.Module) -> None:
    """Cast `modules_to_save` to the dtype of the base, as `load` does: without autocast, dtypes must match."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.to(next(module.original_module.parameters()).dtype)


def read_trained(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of trained weights, which training never saves with NaN or infinite values.

    Raises:
        ModelError: There is no such file.
        RefusedError: It is damaged, or a tensor is not floating-point or not finite.
    """
    if not file.is_file():
        raise ModelError(f"no {file.name}", where=str(file.parent), hint="the run has not finished: train it")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise _damaged(file, f"the file is damaged: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise _damaged(
                file, f"{name} has type {str(tensor.dtype).removeprefix('torch.')}, not a floating-point one"
            )
        if not tensor.isfinite().all():
            raise _damaged(file, f"{name} has values that are NaN or infinite")
    return tensors


def _damaged(file: Path, what: str) -> RefusedError:
    return RefusedError(what, where=str(file), hint="train the run again, or restore a good copy")


def _bitsandbytes_kinds(model: nn.Module) -> tuple[bool, bool]:
    """Whether layers are 4-bit or 8-bit ones of bitsandbytes; PEFT chooses its layer class by these flags."""
    kinds = {type(layer).__name__ for layer in model.modules()}
    return "Linear4bit" in kinds, "Linear8bitLt" in kinds


def _tensors(model: PeftModel) -> dict[str, Tensor]:
    """The tensors of an adapter by their names on disk."""
    return get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=False)

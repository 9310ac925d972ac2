"""Writing a model with some of its layers changed (a merged adapter), with one layer in memory at a time.

Tensors keep the names and layouts that they have in the base's files: every reader of the base can read the result.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from finetune.models.fsdp import all_gathered
from finetune.models.loading.folder_check import GENERATION_CONFIG
from finetune.models.loading.layerwise import StreamedModel
from finetune.models.loading.meta_model import read_config
from finetune.models.loading.model_files import ModelFolder
from finetune.models.loading.quantized_checkpoint import config_of
from finetune.models.safetensors_io import SAFETENSORS_DTYPES, Planned, StoredTensor, TensorWriter, tensor_writer
from finetune.quantizers.base import Quantizer
from finetune.quantizers.layer import QuantizedLinear

PREPROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Settings of what is beside the language model of a checkpoint."""

MergeLayer = Callable[[nn.Module], nn.Module]
"""Maps an adapted layer to the merged layer, whose tensors have the names and shapes of the base's layer."""


def write_merged(
    streamed: StreamedModel,
    merge_layer: MergeLayer,
    dtype: torch.dtype,
    folder: Path,
    further: Mapping[str, StoredTensor] = MappingProxyType({}),
) -> None:
    """Write a merged model in a form that plain transformers loads.

    Args:
        streamed: The base, dequantized, with an adapter around some layers.
        merge_layer: Merges the adapter into one of them.
        dtype: Dtype of every floating-point weight.
        folder: Where to write.
        further: Tensors that are copied as they are: those of the base that its class does not build.
    """
    changed = {name for place in streamed.replaced() for name in streamed.tensors(place)}
    merged = _MergedWeights(streamed, merge_layer)
    # An adapter on one of two tied weights (embeddings and head) unties them: then both are written.
    untied = merged.untied(changed)
    planned: dict[str, Planned] = {}
    for name, tensor in streamed.tensors().items():
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        if name in untied:
            planned[name] = Planned(kind, tuple(tensor.shape))
        elif name not in streamed.tied:
            files = streamed.sources[name].files
            # The model's shape, not the file's, where both are one tensor: the file may hold packed codes.
            is_unchanged = streamed.sources[name].converter is None
            shapes = {file: tuple(tensor.shape) if is_unchanged else streamed.files[file].shape for file in files}
            planned |= {file: Planned(kind, shape) for file, shape in shapes.items()}
    with tensor_writer(folder, {**further, **planned}) as writer:
        # Merged layers first: `_write_unchanged` then writes what is still missing, from the base's files.
        for name, tensor in merged.tensors():
            if name in untied:
                writer.put(name, tensor)
            elif name not in streamed.tied:
                for file, piece in streamed.stored_as(name, tensor).items():
                    writer.put(file, piece)
        for name in streamed.tensors():
            if name in untied & writer.missing:  # its other half was changed alone: this one stays as it was
                writer.put(name, streamed.weight(name))
            elif name not in streamed.tied:
                _write_unchanged(streamed, name, writer)
    own, whole = streamed.model.config, whole_config(streamed.model.config, streamed.folder)
    for config in (own, whole):
        config.dtype = dtype
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if untied:
            config.tie_word_embeddings = False
    _write_settings(streamed, whole, folder)


def write_merged_quantized(
    streamed: StreamedModel,
    merge_layer: MergeLayer,
    folder: Path,
    further: Mapping[str, StoredTensor] = MappingProxyType({}),
) -> None:
    """Write a merged model with unchanged codes, as `load_model` loads it; other weights in the dtypes of their files.

    Args:
        streamed: The base, quantized, with an adapter around some quantized layers and no other.
        merge_layer: Merges the adapter into the minimums of one of them (QA-LoRA).
        folder: Where to write.
        further: As for `write_merged`.
    """
    changed = streamed.replaced()
    quantizers: dict[str, Quantizer] = {}
    planned = {}
    for name, tensor in streamed.tensors().items():
        layer, _, own_name = name.rpartition(".")
        module = streamed.original(layer)
        if isinstance(module, QuantizedLinear) and own_name != "bias":
            quantizer: Any = module.quantizer.shifted if layer in changed else module.quantizer
            spec = quantizer.tensor_specs(module.out_features, module.in_features)[own_name]
            quantizers[layer], planned[name] = quantizer, Planned(spec.dtype, spec.shape)
        elif name not in streamed.tied:
            stored = streamed.files[streamed.sources[name].files[0]]
            planned[name] = Planned(SAFETENSORS_DTYPES[stored.dtype], tuple(tensor.shape))
    with tensor_writer(folder, {**further, **planned}) as writer:
        for name, tensor in _MergedWeights(streamed, merge_layer).tensors():
            writer.put(name, tensor)
        for layer in sorted({name.rpartition(".")[0] for name in writer.missing}):
            with streamed.filled(layer):
                for name, tensor in streamed.tensors(layer).items():
                    if name in writer.missing:
                        writer.put(name, tensor)
    streamed.model.config.quantization_config = config_of(quantizers)
    _write_settings(streamed, streamed.model.config, folder)


def write_from_shards(model: Any, folder: Path) -> None:
    """Write a sharded model as one file that plain transformers loads.

    The other ranks must all-gather `saved_tensors` at the same time (`fsdp.all_gathered`).

    Args:
        model: A base whose weights were trained; tied ones are written once.
        folder: Where to write.
    """
    tensors = saved_tensors(model)
    shapes = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    planned = {
        file: Planned(piece.dtype, tuple(piece.shape))
        for name, shape in shapes.items()
        for file, piece in revert_weight_conversion(model, {name: shape}).items()
    }
    with all_gathered(tensors) as pending, tensor_writer(folder, planned, shard_bytes=inf) as writer:
        for name, tensor in pending:
            for file, piece in revert_weight_conversion(model, {name: tensor}).items():
                writer.put(file, piece)
    model.config.dtype = model.dtype
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]  # `fully_shard` renames the class
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model that are saved, by name: parameters, tied ones once, and persistent buffers."""
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {**dict(model.named_parameters()), **buffers}


class _MergedWeights:
    """The tensors of merged layers, one layer at a time."""

    def __init__(self, streamed: StreamedModel, merge_layer: MergeLayer) -> None:
        self.streamed, self.merge_layer = streamed, merge_layer
        self.left = streamed.replaced()
        self.ready: dict[str, Tensor] = {}

    def untied(self, changed: set[str]) -> set[str]:
        """Names of tied weights that differ after the merge."""
        untied = set()
        for name, other in self.streamed.same_weight().items():
            if changed & {name, other}:
                for place in [place for place in self.left if {name, other} & set(self.streamed.tensors(place))]:
                    self.ready |= self._one(place, self.left.pop(place))
                first, second = (
                    self.ready[each] if each in self.ready else self.streamed.weight(each) for each in (name, other)
                )
                if not torch.equal(first, second):
                    untied.add(name)
        return untied

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of them, by name."""
        yield from self.ready.items()
        self.ready.clear()
        for place, layer in self.left.items():
            yield from self._one(place, layer).items()

    def _one(self, place: str, layer: nn.Module) -> dict[str, Tensor]:
        with self.streamed.filled(place):
            return {f"{place}.{name}": tensor for name, tensor in self.merge_layer(layer).state_dict().items()}


def _write_unchanged(streamed: StreamedModel, name: str, writer: TensorWriter) -> None:
    """Write the stored tensors of a tensor of the model, unchanged, unless they are written already."""
    source = streamed.sources[name]
    for file in set(source.files) & writer.missing:
        writer.put(file, streamed.weight(name) if source.converter is None else streamed.files[file].read())


def whole_config(own: Any, base: ModelFolder) -> Any:
    """The config of a written model: that of the checkpoint's own class, where the model is a part of it.

    Of a vision-language checkpoint the language model is trained. Its tensors keep their names, so that with those of
    the other parts and this config the whole checkpoint loads as before.

    Args:
        own: The model's config, which becomes a part of the result.
        base: The checkpoint.
    """
    whole = read_config(base)
    part = next((key for key in whole.sub_configs if type(getattr(whole, key, None)) is type(own)), None)
    if part is None:
        return own
    setattr(whole, part, own)
    return whole


def _write_settings(streamed: StreamedModel, config: Any, folder: Path) -> None:
    if config is streamed.model.config:
        config.architectures = [type(streamed.model).__name__]
    config.save_pretrained(folder)
    copy_settings(streamed.folder, (GENERATION_CONFIG, *PREPROCESSORS), folder)


def copy_settings(base: ModelFolder, names: Sequence[str], folder: Path) -> None:
    """Copy those files of settings that a base has."""
    for name in names:
        if (base.path / name).is_file():
            shutil.copyfile(base.path / name, folder / name)

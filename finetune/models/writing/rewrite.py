"""A model's weights written anew, some of its layers changed: one layer in memory at a time.

Tensors keep the names and the form that they have in the base's files, so that what reads the base reads the result.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from finetune.models.fsdp import all_gathered
from finetune.models.loading.layerwise import StreamedModel
from finetune.models.loading.model_files import GENERATION_CONFIG
from finetune.models.loading.quantized_checkpoint import config_of
from finetune.models.safetensors_io import DTYPES, Planned, TensorWriter, tensor_writer
from finetune.quantizers.base import Quantizer
from finetune.quantizers.layer import QuantizedLinear

MergeLayer = Callable[[nn.Module], nn.Module]
"""From what stands in the place of a layer to the layer that it becomes, its tensors named and shaped as before."""


def write_merged(streamed: StreamedModel, fold: MergeLayer, dtype: torch.dtype, folder: Path) -> None:
    """Write a model as plain transformers loads it.

    Args:
        streamed: Without codes, and with an adapter around some layers.
        fold: Gives each of them without it.
        dtype: Of every floating-point weight.
        folder: Where to.
    """
    changed = {name for place in streamed.replaced() for name in streamed.tensors(place)}
    folded = _MergedWeights(streamed, fold)
    untied = folded.untied(changed)
    planned = {}
    for name, tensor in streamed.tensors().items():
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        if name in untied:
            planned[name] = Planned(kind, tuple(tensor.shape))
        elif name not in streamed.tied:
            files = streamed.sources[name].files
            is_whole = streamed.sources[name].converter is None  # its layer may be stored quantized
            shapes = {file: tuple(tensor.shape) if is_whole else streamed.files[file].shape for file in files}
            planned |= {file: Planned(kind, shape) for file, shape in shapes.items()}
    with tensor_writer(folder, planned) as writer:
        for name, tensor in folded.tensors():
            if name in untied:
                writer.put(name, tensor)
            elif name not in streamed.tied:
                for file, piece in streamed.stored_as(name, tensor).items():
                    writer.put(file, piece)
        for name in streamed.tensors():
            if name not in streamed.tied:
                _write_unchanged(streamed, name, writer)
    config = streamed.model.config
    config.dtype = dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if untied:
        config.tie_word_embeddings = False
    _write_settings(streamed, folder)


def write_merged_quantized(streamed: StreamedModel, fold: MergeLayer, folder: Path) -> None:
    """Write a model with its codes as they are, as `load_model` loads it; other weights in the types of their files.

    Args:
        streamed: With codes, and with an adapter around some quantized layers and nothing else.
        fold: Gives each of them without it, its minimums shifted.
        folder: Where to.
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
            planned[name] = Planned(DTYPES[stored.dtype], tuple(tensor.shape))
    with tensor_writer(folder, planned) as writer:
        for name, tensor in _MergedWeights(streamed, fold).tensors():
            writer.put(name, tensor)
        for layer in sorted({name.rpartition(".")[0] for name in writer.missing}):
            with streamed.filled(layer):
                for name, tensor in streamed.tensors(layer).items():
                    if name in writer.missing:
                        writer.put(name, tensor)
    streamed.model.config.quantization_config = config_of(quantizers)
    _write_settings(streamed, folder)


def write_from_shards(model: Any, folder: Path) -> None:
    """Write a model of which each process holds a share, as plain transformers loads it, into a single file.

    The other processes must put `saved_tensors` together meanwhile.

    Args:
        model: A base whose weights were trained; tied ones are written once.
        folder: Where to.
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
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What is saved of a model, by name: parameters, tied ones once, and the buffers that belong to its state."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}


class _MergedWeights:
    """The tensors of layers that were folded, a layer at a time."""

    def __init__(self, streamed: StreamedModel, fold: MergeLayer) -> None:
        self.streamed, self.fold = streamed, fold
        self.left = streamed.replaced()
        self.ready: dict[str, Tensor] = {}

    def untied(self, changed: set[str]) -> set[str]:
        """Names of weights that were one with another and are not any more."""
        apart = set()
        for name, other in self.streamed.same_weight().items():
            if changed & {name, other}:
                for place in [place for place in self.left if {name, other} & set(self.streamed.tensors(place))]:
                    self.ready |= self._one(place, self.left.pop(place))
                first, second = (
                    self.ready[each] if each in self.ready else self.streamed.weight(each) for each in (name, other)
                )
                if not torch.equal(first, second):
                    apart.add(name)
        return apart

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of them, by name."""
        yield from self.ready.items()
        self.ready.clear()
        for place, layer in self.left.items():
            yield from self._one(place, layer).items()

    def _one(self, place: str, layer: nn.Module) -> dict[str, Tensor]:
        with self.streamed.filled(place):
            return {f"{place}.{name}": tensor for name, tensor in self.fold(layer).state_dict().items()}


def _write_unchanged(streamed: StreamedModel, name: str, writer: TensorWriter) -> None:
    """Write a tensor of the model as it is, or the stored ones that it is made of, where they are not written yet."""
    source = streamed.sources[name]
    for file in set(source.files) & writer.missing:
        writer.put(file, streamed.weight(name) if source.converter is None else streamed.files[file].read())


def _write_settings(streamed: StreamedModel, folder: Path) -> None:
    streamed.model.config.architectures = [type(streamed.model).__name__]
    streamed.model.config.save_pretrained(folder)
    generation = streamed.folder.path / GENERATION_CONFIG
    if generation.is_file():
        shutil.copyfile(generation, folder / GENERATION_CONFIG)

"""A model's weights written anew, some of its layers changed: one layer in memory at a time.

Tensors keep the names that they have in the base's files, so that what reads the base reads the result. Only one that
changes and was put together from several, or is tied no longer, gets the model's own name for it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.models.quantized import config_of
from finetune.models.streaming import StreamedModel
from finetune.models.tensor_files import DTYPES, Planned, tensor_writer
from finetune.quantizers.base import Quantizer
from finetune.quantizers.layer import QuantizedLinear

Fold = Callable[[nn.Module], nn.Module]
"""From what stands in the place of a layer to the layer that it becomes, its tensors named and shaped as before."""

GENERATION_CONFIG = "generation_config.json"


def write_folded(streamed: StreamedModel, fold: Fold, dtype: torch.dtype, folder: Path) -> None:
    """Write a model as plain transformers loads it.

    Args:
        streamed: Without codes, and with an adapter around some layers.
        fold: Gives each of them without it.
        dtype: Of every floating-point weight.
        folder: Where to.
    """
    tensors = streamed.tensors()
    changed = {name for place in streamed.replaced() for name in streamed.tensors(place)}
    folded = _Folded(streamed, fold)
    untied = folded.untied(changed)
    made_of = _files(streamed, changed, untied)
    planned = {}
    for file, name in made_of.items():
        found = streamed.files[file] if name is None else tensors[name]
        kind = DTYPES[found.dtype] if isinstance(found.dtype, str) else found.dtype
        planned[file] = Planned(dtype if kind.is_floating_point else kind, tuple(found.shape))
    with tensor_writer(folder, planned) as writer:
        files = {name: file for file, name in made_of.items() if name is not None}
        for name, tensor in folded.tensors():
            if name in files:
                writer.put(files[name], tensor)
        for file in sorted(writer.missing):
            name = made_of[file]
            writer.put(file, streamed.files[file].read() if name is None else streamed.weight(name))
    config = streamed.model.config
    config.dtype = dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if untied:
        config.tie_word_embeddings = False
    _write_settings(streamed, folder)


def write_folded_quantized(streamed: StreamedModel, fold: Fold, folder: Path) -> None:
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
            quantizer = module.quantizer.shifted if layer in changed else module.quantizer
            spec = quantizer.tensor_specs(module.out_features, module.in_features)[own_name]
            quantizers[layer], planned[name] = quantizer, Planned(spec.dtype, spec.shape)
        elif name not in streamed.tied:
            stored = streamed.files[streamed.sources[name].files[0]]
            planned[name] = Planned(DTYPES[stored.dtype], tuple(tensor.shape))
    with tensor_writer(folder, planned) as writer:
        for name, tensor in _Folded(streamed, fold).tensors():
            writer.put(name, tensor)
        for layer in sorted({name.rpartition(".")[0] for name in writer.missing}):
            with streamed.filled(layer):
                for name, tensor in streamed.tensors(layer).items():
                    if name in writer.missing:
                        writer.put(name, tensor)
    streamed.model.config.quantization_config = config_of(quantizers)
    _write_settings(streamed, folder)


class _Folded:
    """The tensors of layers that were folded, a layer at a time."""

    def __init__(self, streamed: StreamedModel, fold: Fold) -> None:
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


def _files(streamed: StreamedModel, changed: set[str], untied: set[str]) -> dict[str, str | None]:
    """From the name of each tensor to write to that of the model's tensor; None where the stored one stays."""
    from_converters: dict[int, list[str]] = {}
    for name, source in streamed.sources.items():
        if source.converter is not None:
            from_converters.setdefault(id(source), []).append(name)
    files: dict[str, str | None] = {}
    for name in streamed.tensors():
        if name in streamed.tied:
            if name in untied:
                files[name] = name
            continue
        source = streamed.sources[name]
        if source.converter is None:
            files[source.files[0]] = name
        elif changed & set(from_converters[id(source)]):
            files[name] = name
        else:
            files.update(dict.fromkeys(source.files))
    return files


def _write_settings(streamed: StreamedModel, folder: Path) -> None:
    streamed.model.config.architectures = [type(streamed.model).__name__]
    streamed.model.config.save_pretrained(folder)
    generation = streamed.folder.path / GENERATION_CONFIG
    if generation.is_file():
        shutil.copyfile(generation, folder / GENERATION_CONFIG)

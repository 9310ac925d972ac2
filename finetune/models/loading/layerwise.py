"""A model whose weights stay in their files: each layer's are read when it computes, and forgotten after.

Memory holds about one layer at a time, however large the model is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.pytorch_utils import Conv1D

from finetune.errors import ModelError
from finetune.malloc import HeapTrimmer
from finetune.models.linear_layers import shape_of
from finetune.models.loading.meta_model import meta_model, read_config
from finetune.models.loading.model_files import ModelFolder
from finetune.models.loading.quantized_checkpoint import stored_quantization
from finetune.models.safetensors_io import own_memory, stored_tensors
from finetune.quantizers.base import Quantized, Quantizer, is_quantized
from finetune.quantizers.choice import Quantizers
from finetune.quantizers.layer import PackedQuantizer, QuantizedLinear
from finetune.quantizers.on_load import OnLoadConfig, quantizable_layers, replacement
from finetune.recipe.sections.model import Model


class Source(NamedTuple):
    """What a tensor of a model is made of.

    Attributes:
        files: Names of stored tensors.
        converter: Puts them together, such as the weights of experts; None where the tensor is stored as it is.
        first: The name by which the converter goes, that of the first tensor that it makes.
        patterns: For each stored tensor the converter's name of its kind.
    """

    files: list[str]
    converter: WeightConverter | None
    first: str
    patterns: list[str]


class StreamedModel:
    """A causal language model whose weights are not there; while they are not, they read as NaN.

    Args:
        folder: Its files.
        section: The recipe's section, for the attention kernel.
        quantizers: How each of its linear layers is stored, as for `load_model`.
        device: Where layers compute.
        dequantized: Whether every quantized layer is an ordinary one, of the weight that its codes stand for. Layers of
            bitsandbytes always are, unless `in_torch` says otherwise.
        dtype: Of the weights that are not quantized, but for those that transformers keeps in float32.
        in_torch: Whether 4-bit layers of bitsandbytes become layers of ours with the same codes.

    Attributes:
        model: The model, on which adapters go as on any other.
        sources: What its tensors are made of, by name.
        quantizers: Of its quantized layers, by name.
        tied: From the name of a weight without files of its own to that of the same weight which has some.

    Raises:
        ModelError: The files lack a weight.
    """

    def __init__(
        self,
        folder: ModelFolder,
        section: Model,
        quantizers: Quantizers,
        device: torch.device,
        dequantized: bool,
        dtype: torch.dtype = torch.float32,
        in_torch: bool = False,
    ) -> None:
        self.folder, self.device, self._freed = folder, device, HeapTrimmer()
        self.files = stored_tensors(folder.path)
        self.model = meta_model(read_config(folder), section, dtype).eval()
        self.model.name_or_path = self.model.config._name_or_path = folder.name
        self._stored = stored_quantization(folder)
        choose = OnLoadConfig.from_dict(self._stored.model_dump()).choose if self._stored else quantizers
        layers = quantizable_layers(self.model, with_head=self._stored is not None)
        self.quantizers: dict[str, Quantizer] = {name: each for name in layers if (each := choose(name)) is not None}
        self._plain = {name: layers[name] for name in self.quantizers}
        self.sources = _find_sources(self.model, list(self.files), self._names_of_codes())
        self.tied: dict[str, str] = {}
        self._untie_what_differs()
        self._refuse_missing()
        if not dequantized:
            for name, quantizer in self.quantizers.items():
                packed = getattr(quantizer, "in_torch", quantizer) if in_torch else quantizer
                if isinstance(packed, PackedQuantizer):
                    self.model.set_submodule(name, replacement(name, layers[name], packed, dtype))
        self._parts = self._to_placeholders(self._kept_in_float32(dtype))
        self._originals = dict(self.model.named_modules())

    def _names_of_codes(self) -> list[str]:
        """Names of the tensors of quantized layers, where the files hold these."""
        if not self._stored:
            return []
        return [
            f"{name}.{tensor}"
            for name, quantizer in self.quantizers.items()
            if isinstance(quantizer, PackedQuantizer)
            for tensor in quantizer.tensor_specs(*shape_of(self._plain[name]))
        ]

    def _untie_what_differs(self) -> None:
        """Where the files hold both of two tied weights and they are not the same, they are not tied."""
        first: dict[int, tuple[str, nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name not in self.sources:
                continue
            other, _ = first.setdefault(id(parameter), (name, parameter))
            if other != name and not torch.equal(self.tensor(other), self.tensor(name)):
                owner, _, own_name = name.rpartition(".")
                self.model.get_submodule(owner).register_parameter(own_name, nn.Parameter(torch.empty_like(parameter)))

    def _refuse_missing(self) -> None:
        weights = list(self.model.named_parameters(remove_duplicate=False))
        stored = {id(parameter): name for name, parameter in weights if name in self.sources}
        if lacking := [name for name, parameter in weights if id(parameter) not in stored]:
            raise ModelError(
                f"{len(lacking)} weights are missing, {lacking[0]} among them",
                where=str(self.folder.path),
                hint="fetch the whole model",
            )
        self.tied = {name: stored[id(each)] for name, each in weights if name not in self.sources}

    def _kept_in_float32(self, dtype: torch.dtype) -> re.Pattern[str] | None:
        """Names of weights that transformers keeps in float32 where the others are in `dtype`."""
        patterns = self.model._get_dtype_plan(dtype)
        return re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns)) if patterns else None

    def _to_placeholders(self, in_float32: re.Pattern[str] | None) -> dict[str, tuple[nn.Module, list[str]]]:
        """Take the memory of every tensor that is in files: from a module's name to the names of those."""
        parts: dict[str, tuple[nn.Module, list[str]]] = {}
        hollow: dict[int, nn.Parameter] = {}
        for module_name, module in self.model.named_modules():
            own = []
            for name, parameter in list(module.named_parameters(recurse=False)):
                if in_float32 and parameter.is_floating_point() and in_float32.search(f"{module_name}.{name}"):
                    parameter = nn.Parameter(parameter.float(), requires_grad=False)
                empty = hollow.setdefault(id(parameter), nn.Parameter(self._empty(parameter), requires_grad=False))
                module.register_parameter(name, empty)
                own.append(name)
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.is_meta or f"{module_name}.{name}" in self.sources:
                    setattr(module, name, self._empty(buffer))
                    own.append(name)
                else:
                    setattr(module, name, buffer.to(self.device))
            if own:
                parts[module_name] = module, own
        return parts

    def _empty(self, like: Tensor) -> Tensor:
        value = float("nan") if like.is_floating_point() else 0
        return torch.full((), value, dtype=like.dtype, device=self.device).expand(like.shape)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the model before anything is quantized, or as it is stored; floating-point ones in float32."""
        source = self.sources[self.tied.get(name, name)]
        pieces = [self.files[file].read() for file in source.files]
        if source.converter is None:
            (tensor,) = pieces
        else:
            converter = deepcopy(source.converter)
            for file, pattern, piece in zip(source.files, source.patterns, pieces, strict=True):
                converter.add_tensor(source.first, file, pattern, piece)
            made = converter.convert(source.first, model=self.model, config=self.model.config)[name]
            tensor = made[0] if isinstance(made, list) else made
        return self._in_float32(tensor) if tensor.is_floating_point() else tensor.to(self.device)

    def _in_float32(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cpu" or tensor.dtype is torch.float32:
            return tensor.to(self.device, torch.float32)
        return own_memory(4 * tensor.numel()).view(torch.float32).view(tensor.shape).copy_(tensor)

    def stored_as(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What the files would hold of a tensor of the model that has this value, by their names."""
        source = self.sources[name]
        if source.converter is None:
            return {source.files[0]: tensor}
        pieces: dict[str, Tensor] = revert_weight_conversion(self.model, {name: tensor})
        assert pieces.keys() == set(source.files), f"{name} would be stored as {sorted(pieces)}"
        return pieces

    def quantized_layer(self, name: str) -> Quantized:
        """A quantized layer as loading the model would make it, without its bias."""
        quantizer, plain = self.quantizers[name], self._plain[name]
        layer = replacement(name, plain, quantizer, torch.float32)
        if self._stored:
            assert isinstance(quantizer, PackedQuantizer)
            tensors = {
                tensor: self.files[self.sources[f"{name}.{tensor}"].files[0]].read().to(self.device)
                for tensor in quantizer.tensor_specs(*shape_of(plain))
            }
        else:
            weight = self.tensor(f"{name}.weight")
            tensors = quantizer.quantize(layer, weight.T if isinstance(plain, Conv1D) else weight)
        for own_name, tensor in tensors.items():
            is_parameter = own_name == "weight" and not isinstance(tensor, nn.Parameter)
            setattr(layer, own_name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
        assert is_quantized(layer)
        return layer

    def quantized_layers(self) -> Iterator[Quantized]:
        """All of them, one after another, in the order of the model."""
        return map(self.quantized_layer, self.quantizers)

    def weight(self, name: str) -> Tensor:
        """A tensor of the model without codes: of a quantized layer the weight that they stand for."""
        layer, _, own_name = name.rpartition(".")
        if layer not in self.quantizers or own_name != "weight":
            return self.tensor(name)
        quantized = self.quantized_layer(layer)
        weight_OI = quantized.quantizer.dequantize(quantized)
        return weight_OI.T.contiguous() if isinstance(self._plain[layer], Conv1D) else weight_OI

    @contextmanager
    def filled(self, within: str = "") -> Iterator[None]:
        """The time in which the weights of the base's module of this name, and of those within it, are there."""
        names = self._within(within)
        for name in names:
            self._fill(name)
        try:
            yield
        finally:
            for name in names:
                self._forget(name)

    def fill(self, within: str = "") -> None:
        """Read the weights of a module and of those within it for good; what has been read so is not read again."""
        for name in self._within(within):
            self._fill(name)
            del self._parts[name]

    def _within(self, place: str) -> list[str]:
        return [name for name in self._parts if not place or name == place or name.startswith(f"{place}.")]

    def _fill(self, name: str) -> None:
        module, own = self._parts[name]
        codes: dict[str, Tensor] = {}
        if isinstance(module, QuantizedLinear):
            quantized: Any = self.quantized_layer(name)
            repack = getattr(quantized.quantizer, "repacked", lambda layer: layer)
            codes = repack(quantized).packed()
        for each in own:
            tensor = getattr(module, each)
            found = codes[each] if each in codes else self.weight(f"{name}.{each}").to(tensor.dtype)
            if found.shape != tensor.shape:
                raise ModelError(
                    f"{name}.{each} has another shape than config.json says",
                    where=str(self.folder.path),
                    hint="use the config.json that belongs to these weights",
                )
            tensor.data = found.data

    def _forget(self, name: str) -> None:
        module, own = self._parts[name]
        for each in own:
            tensor = getattr(module, each)
            dropped, tensor.data = tensor.data, self._empty(tensor)
            self._freed.count(dropped)

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """The time in which the model computes, with whatever was put around its layers."""
        hooks = []
        for name in self._parts:
            around = self.model.get_submodule(name)
            hooks.append(around.register_forward_pre_hook(lambda *_, name=name: self._fill(name)))
            hooks.append(around.register_forward_hook(lambda *_, name=name: self._forget(name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def tensors(self, within: str = "") -> dict[str, Tensor]:
        """The tensors that are read from files, as they are now, of all the base or of one of its modules, by name."""
        return {
            f"{name}.{each}": getattr(module, each)
            for name, (module, own) in self._parts.items()
            for each in own
            if not within or name == within or name.startswith(f"{within}.")
        }

    def original(self, name: str) -> nn.Module:
        """A module of the base, whatever has been put in its place."""
        return self._originals[name]

    def same_weight(self) -> dict[str, str]:
        """From the name of a weight that stands in a second place of the model to its name in the first."""
        first: dict[int, str] = {}
        names = {name: first.setdefault(id(tensor), name) for name, tensor in self.tensors().items()}
        return {name: other for name, other in names.items() if name != other}

    def replaced(self) -> dict[str, nn.Module]:
        """What was put in the place of the base's own modules, the outermost of each, by the name of the place."""
        found: dict[str, nn.Module] = {}

        def look_into(module: nn.Module, name: str) -> None:
            for child_name, child in module.named_children():
                full_name = f"{name}.{child_name}" if name else child_name
                if self._originals.get(full_name) is not child:
                    found[full_name] = child
                else:
                    look_into(child, full_name)

        look_into(self.model, "")
        return found


def _find_sources(model: PreTrainedModel, files: Iterable[str], further: Iterable[str]) -> dict[str, Source]:
    """Which stored tensors make which of the model's, by the rules that transformers loads by.

    Args:
        model: On the meta device.
        files: Names of the stored tensors.
        further: Names that the model's tensors will have beside those that they have.
    """
    known = dict.fromkeys((*model.state_dict(), *further), True)
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    sources: dict[str, Source] = {}
    for file in sorted(files, key=_in_order):
        name, pattern = rename_source_key(file, renamings, converters, model.base_model_prefix, known)
        if name not in known and file in known:
            name, pattern = rename_source_key(file, [], [], model.base_model_prefix, known)
        if name not in known:  # what transformers does not load either
            continue
        if pattern is None:
            sources[name] = Source([file], None, name, [file])
            continue
        converter = by_pattern[pattern]
        source = sources.setdefault(name, Source([], converter, name, []))
        source.files.append(file)
        source.patterns.append(pattern)
        for target in converter.target_patterns[1:]:
            sources[name.replace(converter.target_patterns[0], target)] = source
    return sources


def _in_order(name: str) -> list[tuple[int, str]]:
    """Layers and experts by number."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]

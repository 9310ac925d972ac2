"""Layer-wise loading: a model whose weights stay in their files, read when a layer computes and freed after.

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
from finetune.models.loading.finite import check_finite
from finetune.models.loading.meta_model import meta_model, read_config
from finetune.models.loading.model_files import ModelFolder
from finetune.models.loading.new_tokens import vocabulary_tensors
from finetune.models.loading.quantized_checkpoint import stored_quantization
from finetune.models.safetensors_io import anonymous_mmap
from finetune.models.weight_files import stored_tensors
from finetune.quantizers.base import Quantized, Quantizer, is_quantized
from finetune.quantizers.choice import Quantizers
from finetune.quantizers.layer import PackedQuantizer, QuantizedLinear
from finetune.quantizers.on_load import OnLoadConfig, quantizable_layers, replacement
from finetune.recipe.sections.model import Model


class Source(NamedTuple):
    """The stored tensors that a tensor of a model is loaded from.

    Attributes:
        files: Names of stored tensors.
        converter: Assembles them, such as the weights of experts; None where the tensor is stored unchanged.
        first: The converter's key: the name of the first tensor that it produces.
        patterns: For each stored tensor the converter's source pattern that it matches.
    """

    files: list[str]
    converter: WeightConverter | None
    first: str
    patterns: list[str]


class StreamedModel:
    """A causal language model whose weights are not loaded; unloaded weights are NaN.

    Opening one takes twelve steps, each of which needs those before it:
     1. read the headers of the safetensors files (no data);
     2. construct the meta model, whose names and shapes all later steps use;
     3. name it as the recipe does, for records of the base;
     4. read from config.json whether the stored weights are quantized;
     5. choose a quantizer for each layer: the stored ones, or the recipe's;
     6. keep the original linear layers: their shapes are needed after step 10 has replaced them;
     7. find the stored tensors of each model tensor, the packed ones of quantized layers included;
     8. untie tied weights that the files hold twice with different values (needs 7 to read both);
     9. check that no weight is missing, and record the tied ones (after 8: untied weights are no aliases);
    10. replace quantized layers by `QuantizedLinear`, unless dequantized (after 7, which uses the original names);
    11. replace every tensor by a placeholder on the device (after 10: also the new layers' tensors);
    12. keep all modules by name, before an adapter wraps any.

    Args:
        folder: The model's files.
        section: The recipe's section, for the attention kernel.
        quantizers: How each of its linear layers is stored, as for `load_model`.
        device: Where layers compute.
        dequantized: Whether every quantized layer is an ordinary one with the dequantized weight. Layers of
            bitsandbytes always are, unless `in_torch` is set.
        dtype: Dtype of the weights that are not quantized, except those that transformers keeps in float32.
        in_torch: Whether 4-bit layers of bitsandbytes become `QuantizedLinear` layers with the same codes.

    Attributes:
        model: The model; adapters attach to it as to any other.
        files: The stored tensors by name.
        sources: Where each tensor of the model is loaded from, by name.
        quantizers: The quantizers of its quantized layers, by name.
        tied: Maps the name of a weight without stored tensors to the name of the weight that it is tied to.

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
        self._with_new_rows = set(vocabulary_tensors(self.model)) if folder.new_rows else set()
        self._stored = stored_quantization(folder)
        choose = OnLoadConfig.from_dict(self._stored.model_dump()).choose if self._stored else quantizers
        layers = quantizable_layers(self.model, with_head=self._stored is not None)
        self.quantizers: dict[str, Quantizer] = {name: each for name in layers if (each := choose(name)) is not None}
        self._plain = {name: layers[name] for name in self.quantizers}
        self.sources = _find_sources(self.model, list(self.files), self._packed_names())
        self.tied: dict[str, str] = {}
        self._untie_different()
        self._check_none_missing()
        if not dequantized:
            for name, quantizer in self.quantizers.items():
                packed = getattr(quantizer, "in_torch", quantizer) if in_torch else quantizer
                if isinstance(packed, PackedQuantizer):
                    self.model.set_submodule(name, replacement(name, layers[name], packed, dtype))
        self._parts = self._to_placeholders(self._kept_in_float32(dtype))
        # All names: layers of several blocks may share one activation module.
        self._originals = dict(self.model.named_modules(remove_duplicate=False))

    def _packed_names(self) -> list[str]:
        """Names of the packed tensors of quantized layers, if the files hold these."""
        if not self._stored:
            return []
        return [
            f"{name}.{tensor}"
            for name, quantizer in self.quantizers.items()
            if isinstance(quantizer, PackedQuantizer)
            for tensor in quantizer.tensor_specs(*shape_of(self._plain[name]))
        ]

    def _untie_different(self) -> None:
        """Untie two tied weights if the files hold both, with different values."""
        first: dict[int, tuple[str, nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name not in self.sources:
                continue
            other, _ = first.setdefault(id(parameter), (name, parameter))
            if other != name and not torch.equal(self.tensor(other), self.tensor(name)):
                owner, _, own_name = name.rpartition(".")
                self.model.get_submodule(owner).register_parameter(own_name, nn.Parameter(torch.empty_like(parameter)))

    def _check_none_missing(self) -> None:
        """Record tied weights in `tied`.

        Raises:
            ModelError: A weight has no stored tensor, and neither has one that it is tied to.
        """
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
        """Replace every tensor that has stored ones by a placeholder without memory.

        Returns:
            By the name of each module that has such tensors, the module and the tensors' names in it.
        """
        parts: dict[str, tuple[nn.Module, list[str]]] = {}
        placeholders: dict[int, nn.Parameter] = {}  # one for each tied group, so that weights stay tied
        for module_name, module in self.model.named_modules():
            own = []
            for name, parameter in list(module.named_parameters(recurse=False)):
                if in_float32 and parameter.is_floating_point() and in_float32.search(f"{module_name}.{name}"):
                    parameter = nn.Parameter(parameter.float(), requires_grad=False)
                placeholder = placeholders.setdefault(
                    id(parameter), nn.Parameter(self._placeholder(parameter), requires_grad=False)
                )
                module.register_parameter(name, placeholder)
                own.append(name)
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.is_meta or f"{module_name}.{name}" in self.sources:
                    setattr(module, name, self._placeholder(buffer))
                    own.append(name)
                else:  # computed when the model was constructed, such as rotary frequencies
                    setattr(module, name, buffer.to(self.device))
            if own:
                parts[module_name] = module, own
        return parts

    def _placeholder(self, like: Tensor) -> Tensor:
        """A tensor of the same shape and dtype that takes the memory of one element."""
        # NaN, not 0: a weight that no hook loads must show in the output.
        value = float("nan") if like.is_floating_point() else 0
        return torch.full((), value, dtype=like.dtype, device=self.device).expand(like.shape)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the model as it is stored, before any quantization; floating-point ones in float32.

        Raises:
            ModelError: It is a weight with values that are not finite.
        """
        source = self.sources[self.tied.get(name, name)]
        pieces = [self.files[file].read() for file in source.files]
        if source.converter is None:
            (tensor,) = pieces
        else:
            converter = deepcopy(source.converter)  # a converter collects the tensors that are added to it
            for file, pattern, piece in zip(source.files, source.patterns, pieces, strict=True):
                converter.add_tensor(source.first, file, pattern, piece)
            made = converter.convert(source.first, model=self.model, config=self.model.config)[name]
            tensor = made[0] if isinstance(made, list) else made
        check_finite(name, tensor, self.folder.path)
        if self.folder.new_rows is not None and name in self._with_new_rows:
            tensor = self.folder.new_rows.extended(tensor)
        return self._in_float32(tensor) if tensor.is_floating_point() else tensor.to(self.device)

    def _in_float32(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cpu" or tensor.dtype is torch.float32:
            return tensor.to(self.device, torch.float32)
        # `Tensor.to` would allocate from the heap, which stays with the process after the tensor is freed.
        return anonymous_mmap(4 * tensor.numel()).view(torch.float32).view(tensor.shape).copy_(tensor)

    def stored_as(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The stored tensors that a tensor of the model with this value would be saved as, by name."""
        source = self.sources[name]
        if source.converter is None:
            return {source.files[0]: tensor}
        pieces: dict[str, Tensor] = revert_weight_conversion(self.model, {name: tensor})
        assert pieces.keys() == set(source.files), f"{name} would be stored as {sorted(pieces)}"
        return pieces

    def quantized_layer(self, name: str) -> Quantized:
        """A quantized layer as `load_model` would load it, without its bias."""
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
        """All quantized layers, one at a time, in the order of the model."""
        return map(self.quantized_layer, self.quantizers)

    def weight(self, name: str) -> Tensor:
        """A tensor of the model; for the weight of a quantized layer, the dequantized weight in float32."""
        layer, _, own_name = name.rpartition(".")
        if layer not in self.quantizers or own_name != "weight":
            return self.tensor(name)
        quantized = self.quantized_layer(layer)
        weight_OI = quantized.quantizer.dequantize(quantized)
        return weight_OI.T.contiguous() if isinstance(self._plain[layer], Conv1D) else weight_OI

    @contextmanager
    def filled(self, within: str = "") -> Iterator[None]:
        """A context in which the weights of a module of the base, and of its submodules, are loaded."""
        names = self._within(within)
        for name in names:
            self._fill(name)
        try:
            yield
        finally:
            for name in names:
                self._free(name)

    def fill(self, within: str = "") -> None:
        """Load the weights of a module and of its submodules permanently: later contexts and hooks skip them."""
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
            # A layer of bitsandbytes (`in_torch`) is repacked into ours, with the same codes.
            repack = getattr(quantized.quantizer, "repacked", lambda layer: layer)
            codes = repack(quantized).packed()
        for each in own:
            tensor = getattr(module, each)
            found = codes[each] if each in codes else self.weight(f"{name}.{each}").to(tensor.dtype)
            if found.shape != tensor.shape:
                raise ModelError(
                    f"the shape of {name}.{each} does not match config.json",
                    where=str(self.folder.path),
                    hint="use the config.json that belongs to these weights",
                )
            tensor.data = found.data

    def _free(self, name: str) -> None:
        module, own = self._parts[name]
        for each in own:
            tensor = getattr(module, each)
            dropped, tensor.data = tensor.data, self._placeholder(tensor)
            self._freed.count(dropped)

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """A context in which the model can compute, adapters included: hooks load and free each layer's weights."""
        hooks = []
        for name in self._parts:
            # The module that is there now, which may be an adapter's wrapper around the original: an adapter such as
            # DoRA reads the base's weight outside of the base layer's own forward pass.
            current = self.model.get_submodule(name)
            hooks.append(current.register_forward_pre_hook(lambda *_, name=name: self._fill(name)))
            hooks.append(current.register_forward_hook(lambda *_, name=name: self._free(name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def tensors(self, within: str = "") -> dict[str, Tensor]:
        """The tensors with stored ones, loaded or not, of the base or of one of its modules, by name."""
        return {
            f"{name}.{each}": getattr(module, each)
            for name, (module, own) in self._parts.items()
            for each in own
            if not within or name == within or name.startswith(f"{within}.")
        }

    def original(self, name: str) -> nn.Module:
        """A module of the base, also if an adapter has replaced it."""
        return self._originals[name]

    def same_weight(self) -> dict[str, str]:
        """Tied weights: maps the name at a second place in the model to the name at the first."""
        first: dict[int, str] = {}
        names = {name: first.setdefault(id(tensor), name) for name, tensor in self.tensors().items()}
        return {name: other for name, other in names.items() if name != other}

    def replaced(self) -> dict[str, nn.Module]:
        """The modules that replace the base's own, by the name of the base's module; only the outermost of each."""
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
    """The stored tensors of each of the model's tensors, by the rules that transformers loads by.

    Args:
        model: A model on the meta device.
        files: Names of the stored tensors.
        further: Further names of tensors that the model will get.
    """
    known = dict.fromkeys((*model.state_dict(), *further), True)
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    sources: dict[str, Source] = {}
    for file in sorted(files, key=_in_order):
        name, pattern = rename_source_key(file, renamings, converters, model.base_model_prefix, known)
        if name not in known and file in known:  # a rename rule took a name that needs none
            name, pattern = rename_source_key(file, [], [], model.base_model_prefix, known)
        if name not in known:  # transformers does not load it either
            continue
        if pattern is None:
            sources[name] = Source([file], None, name, [file])
            continue
        converter = by_pattern[pattern]
        source = sources.setdefault(name, Source([], converter, name, []))
        source.files.append(file)
        source.patterns.append(pattern)
        for target in converter.target_patterns[1:]:  # one converter may produce several tensors
            sources[name.replace(converter.target_patterns[0], target)] = source
    return sources


def _in_order(name: str) -> list[tuple[int, str]]:
    """Sort key: layers and experts by number, so that experts are added to their converter in order."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]

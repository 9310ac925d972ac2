"""Quantizing while transformers loads: each weight is quantized as it is read, then freed.

transformers has hooks for this (`HfQuantizer`). Here they call our `Quantizer` interface, for all kinds of
quantization. A quantized checkpoint loads through the same hooks. Importing this module registers them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import isfinite
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from finetune.errors import ModelError, UnsupportedError
from finetune.malloc import HeapTrimmer
from finetune.quantizers.base import Quantizer, is_quantized
from finetune.quantizers.direct_weights import stays_unquantized
from finetune.quantizers.layer import PackedQuantizer
from finetune.recipe.sections.quantization import StoredQuantization
from finetune.resolve import build

METHOD = "ft"


@register_quantization_config(METHOD)
class OnLoadConfig(QuantizationConfigMixin):
    """The `quantization_config` argument of `from_pretrained` for our quantizers.

    Args:
        choose: Maps a linear layer's name to its quantizer; None leaves the layer unquantized.
        compute_dtype: Dtype of the layers' matmuls.
        stored: The section in config.json of a quantized checkpoint.
    """

    def __init__(
        self,
        choose: Callable[[str], Quantizer | None],
        compute_dtype: torch.dtype,
        stored: StoredQuantization | None = None,
    ) -> None:
        self.quant_method = METHOD
        self.choose = choose
        self.compute_dtype = compute_dtype
        self.stored = stored

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> OnLoadConfig:
        """The config from a section of config.json, validated by the recipe's own sections.

        Raises:
            ModelError: It is not what `to_dict` writes.
        """
        stored = as_stored(config_dict)
        quantizers = [_packed(build(section)) for section in stored.quantizers]
        chosen = {name: quantizers[index] for name, index in stored.layers.items()}
        return cls(chosen.get, torch.float32, stored)

    def to_dict(self) -> dict[str, Any]:
        """The section of config.json: data, no objects."""
        return self.stored.model_dump() if self.stored else {"quant_method": METHOD}


def as_stored(config: dict[str, Any]) -> StoredQuantization:
    """`quantization_config` of a config.json, validated.

    Raises:
        ModelError: It is not what we write.
    """
    try:
        return StoredQuantization.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("quantization_config", *first["loc"])))
        raise ModelError(
            f"the quantization_config in config.json is invalid: {first['msg']}",
            where=key,
            hint="quantize the model again",
        ) from error


@register_quantizer(METHOD)
class OnLoadQuantizer(HfQuantizer):
    """The hooks: replace the linear layers on the meta device, and quantize each weight when it has been read.

    Attributes:
        non_finite: Names of weights with NaN or infinite values, which their codes no longer show.
    """

    is_trainable = True

    def __init__(self, quantization_config: OnLoadConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.freed = HeapTrimmer()
        self.non_finite: list[str] = []

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a checkpoint tensor is the weight of a replaced layer."""
        module, tensor_name = get_module_from_name(model, param_name)
        return not self.pre_quantized and is_quantized(module) and tensor_name == "weight"

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes of one element of a parameter after loading.

        transformers reserves the sum on a GPU before it loads. bitsandbytes' layers declare their weight as float32
        until they have data, which is up to eight times the stored size.
        """
        if not param.is_floating_point() or not self.param_needs_quantization(model, param_name):
            return float(super().param_element_size(model, param_name, param))
        layer, _ = get_module_from_name(model, param_name)
        return float(layer.quantizer.bits_per_weight / 8)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, dtype: Any = None, **kwargs: Any) -> None:
        config = self.quantization_config
        linears = quantizable_layers(model, with_head=config.stored is not None)
        replaced = []
        for name, layer in linears.items():
            quantizer = config.choose(name)
            if quantizer is None:
                continue
            in_dtype = dtype if config.stored else config.compute_dtype
            model.set_submodule(name, replacement(name, layer, quantizer, in_dtype))
            replaced.append(re.escape(name))
        if config.stored and len(replaced) != len(config.stored.layers):
            raise ModelError(
                f"config.json names {len(config.stored.layers)} quantized layers, the model has {len(replaced)}",
                where="quantization_config.layers",
                hint="use the config.json that belongs to these weights",
            )
        if replaced and not config.stored:
            # Read in float32, not in the dtype of the other weights: codes must not depend on that.
            pattern = rf"^(?:{'|'.join(replaced)})\.weight$"
            model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), pattern}

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that converts a checkpoint's tensor to the layer's tensors."""
        return QuantizeOp(self.freed, self.non_finite)

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` may write the model: only with a config for stored weights."""
        return self.quantization_config.stored is not None


class QuantizeOp(ConversionOps):
    """One weight of the checkpoint -> the tensors of its quantized layer."""

    def __init__(self, freed: HeapTrimmer, non_finite: list[str]) -> None:
        self.freed, self.non_finite = freed, non_finite

    def convert(
        self, input_dict: dict[str, Any], model: PreTrainedModel | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantize the weights in `input_dict`, emptying it; returns the tensors by their full names."""
        tensors: dict[str, Tensor] = {}
        for full_name in list(input_dict):
            value = input_dict.pop(full_name)
            weight = value.pop() if isinstance(value, list) else value
            layer, _ = get_module_from_name(model, full_name)
            prefix = full_name.rpartition(".")[0]
            if not all(map(isfinite, weight.aminmax())):
                # transformers reports an error of this function as one of the file's format: the loader raises it.
                self.non_finite.append(full_name)
                weight = torch.zeros_like(weight)
            weight_OI = weight.T if layer.stored_transposed else weight
            for name, tensor in layer.quantizer.quantize(layer, weight_OI).items():
                tensors[f"{prefix}.{name}"] = tensor
            layer._is_hf_initialized = True  # or transformers would initialize the packed weight at random
            self.freed.count(weight)
        return tensors


def quantizable_layers(model: PreTrainedModel, with_head: bool = False) -> dict[str, nn.Module]:
    """The linear layers of a model by name, in its order; the output head only with `with_head`."""
    kept = [] if with_head else HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    return {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) in (nn.Linear, Conv1D) and not _is_kept(name, kept) and not stays_unquantized(model, name)
    }


def replacement(name: str, layer: Any, quantizer: Quantizer, dtype: torch.dtype) -> Any:
    """An empty quantized layer on the meta device that replaces a linear layer.

    Args:
        name: The layer's name in its model.
        layer: The layer to replace.
        quantizer: The quantizer of its weight.
        dtype: Dtype of the layer's matmul.

    Raises:
        UnsupportedError: The quantizer does not support a weight of this shape.
    """
    transposed = isinstance(layer, Conv1D)
    out_features, in_features = layer.weight.shape[::-1] if transposed else layer.weight.shape
    if reason := quantizer.refuse(in_features, out_features):
        raise UnsupportedError(
            f"the layer {name} cannot be quantized: {reason}",
            where="quantization",
            hint="choose a value that fits every layer",
        )
    empty: Any
    with torch.device("meta"):
        empty = quantizer.empty_layer(in_features, out_features, layer.bias is not None, dtype)
    empty.quantizer = quantizer
    empty.stored_transposed = transposed
    empty.requires_grad_(False)
    assert is_quantized(empty)
    return empty


def _packed(quantizer: Any) -> PackedQuantizer:
    """The quantizer that loads stored codes: the plain PyTorch one on CUDA too."""
    in_torch = getattr(quantizer, "in_torch", quantizer)
    if not isinstance(in_torch, PackedQuantizer):
        raise ModelError(
            f"weights in {quantizer.section.kind} cannot be stored",
            where="quantization_config.quantizers",
            hint="quantize the model again",
        )
    return in_torch


def _is_kept(name: str, kept: list[str]) -> bool:
    return any(name == part or name.endswith(f".{part}") or name.startswith(f"{part}.") for part in kept)

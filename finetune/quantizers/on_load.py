"""Quantizing while transformers loads: each weight is quantized as it is read, then forgotten.

transformers offers hooks for this (`HfQuantizer`); here they are tied to our `Quantizer` interface once,
for all kinds of quantization. Importing this module registers the hooks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from finetune.errors import UnsupportedError
from finetune.quantizers.base import Quantizer, is_quantized

METHOD = "ft"


@register_quantization_config(METHOD)
class OnLoadConfig(QuantizationConfigMixin):
    """Carries a quantizer through `from_pretrained`.

    Args:
        quantizer: What each linear layer is handed to.
        compute_dtype: Type in which the layers multiply.
    """

    def __init__(self, quantizer: Quantizer, compute_dtype: torch.dtype) -> None:
        self.quant_method = METHOD
        self.quantizer = quantizer
        self.compute_dtype = compute_dtype

    def to_dict(self) -> dict[str, Any]:
        """What may stand in a config.json: the method, not the object."""
        return {"quant_method": METHOD}


@register_quantizer(METHOD)
class OnLoadQuantizer(HfQuantizer):
    """The hooks: replace the linear layers on the meta device, quantize each weight when it arrives."""

    is_trainable = True

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a checkpoint tensor is the weight of a replaced layer."""
        module, tensor_name = get_module_from_name(model, param_name)
        return is_quantized(module) and tensor_name == "weight"

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        kept = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        for name, layer in list(model.named_modules()):
            if type(layer) not in (nn.Linear, Conv1D) or _is_kept(name, kept):
                continue
            transposed = isinstance(layer, Conv1D)
            out_features, in_features = layer.weight.shape[::-1] if transposed else layer.weight.shape
            quantizer = config.quantizer
            if reason := quantizer.refuse(in_features, out_features):
                raise UnsupportedError(
                    f"the layer {name} cannot be quantized: {reason}",
                    where="quantization",
                    hint="choose a value that fits every layer",
                )
            with torch.device("meta"):
                empty = quantizer.empty_layer(in_features, out_features, layer.bias is not None, config.compute_dtype)
            empty.quantizer = quantizer
            empty.stored_transposed = transposed
            model.set_submodule(name, empty.requires_grad_(False))

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that turns a checkpoint's tensor into the layer's tensors."""
        return QuantizeOp()

    def is_serializable(self) -> bool:
        """Not by transformers: we save merged weights ourselves."""
        return False


class QuantizeOp(ConversionOps):
    """One weight of the checkpoint -> the tensors of its quantized layer."""

    def convert(
        self, input_dict: dict[str, Any], model: PreTrainedModel | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantize the weights in `input_dict`; returns the tensors by their full names."""
        tensors: dict[str, Tensor] = {}
        for full_name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            layer, _ = get_module_from_name(model, full_name)
            prefix = full_name.rpartition(".")[0]
            weight_OI = weight.T if layer.stored_transposed else weight
            for name, tensor in layer.quantizer.quantize(layer, weight_OI).items():
                tensors[f"{prefix}.{name}"] = tensor
            layer._is_hf_initialized = True
        return tensors


def _is_kept(name: str, kept: list[str]) -> bool:
    return any(name == part or name.endswith(f".{part}") or name.startswith(f"{part}.") for part in kept)

"""transformers reserves GPU memory for the stored size of quantized weights, not for their size in float32."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_utils import get_total_byte_count

from finetune.quantizers.bits_and_bytes import CudaFourBitQuantizer, EightBitQuantizer
from finetune.quantizers.choice import Quantizers
from finetune.quantizers.on_load import OnLoadConfig, OnLoadQuantizer
from finetune.recipe.sections.quantization import FourBit
from tests.fixtures.tiny import tiny_config
from tests.unit.quantizers.loading import PACKED, section

QUANTIZERS = {
    "nf4": CudaFourBitQuantizer(FourBit(kind="nf4")),
    "fp4": CudaFourBitQuantizer(FourBit(kind="fp4", double_quant=False)),
    "int8": EightBitQuantizer(section(kind="int8")),
    "affine-4": Quantizers(PACKED["affine-4"])("model.layers.0.mlp.up_proj"),
    "nf4 in PyTorch": CudaFourBitQuantizer(FourBit(kind="nf4")).in_torch,
}


def reserved_bytes(quantizer: object | None) -> float:
    """Of a model in bfloat16 whose linear layers have this quantizer, on a GPU that need not exist."""
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config(hidden_size=256, intermediate_size=512)).bfloat16()
    hooks = OnLoadQuantizer(OnLoadConfig(lambda name: quantizer, torch.bfloat16))
    hooks.pre_quantized = False
    hooks._process_model_before_weight_loading(model, torch.bfloat16)
    everywhere = {name: torch.device("cuda") for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    return sum(get_total_byte_count(model, everywhere, hooks).values())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_reservation_counts_quantized_weights_at_their_stored_size(name: str):
    quantizer, config = QUANTIZERS[name], tiny_config(hidden_size=256, intermediate_size=512)
    keys = 256 // config.num_attention_heads * config.num_key_value_heads
    weights = config.num_hidden_layers * (2 * 256 * 256 + 2 * 256 * keys + 3 * 256 * 512)
    plain = reserved_bytes(None)
    expected = plain - 2 * weights + quantizer.bits_per_weight / 8 * weights
    assert reserved_bytes(quantizer) == pytest.approx(expected, rel=0.02)

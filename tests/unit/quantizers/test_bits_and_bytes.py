"""bitsandbytes' layers through our Quantizer: bits, codes, gradients."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import nn

from finetune.data.batches import padded
from finetune.data.encode import Example
from finetune.evaluation.loss import held_out_loss
from finetune.models.folder import ModelFolder
from finetune.models.linears import count_parameters, dequantize_model
from finetune.models.load import load_model
from finetune.quantizers.base import Quantizer
from finetune.recipe.adapter import Lora
from finetune.recipe.model import Model
from finetune.recipe.quantization import EightBit, FourBit, NoQuantization
from finetune.resolve import build
from finetune.train.loss import summed_cross_entropy

CPU = torch.device("cpu")
ROW = Example(list(range(1, 25)), [False] * 8 + [True] * 16)


def load(folder: Path, section: FourBit | EightBit | NoQuantization) -> tuple[nn.Module, Quantizer]:
    quantizer = build(section)
    model = load_model(
        ModelFolder(folder, str(folder)),
        Model(name=str(folder)),
        quantizer,
        weight_dtype=torch.float32,
        compute_dtype=torch.float32,
        device=CPU,
    )
    return model, quantizer


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("double_quant", [True, False])
def test_weights_are_bitsandbytes_own_codes_block_for_block(
    tiny_model: Path, kind: str, block_size: int, double_quant: bool
):
    plain, _ = load(tiny_model, NoQuantization())
    quantized, quantizer = load(tiny_model, FourBit(kind=kind, block_size=block_size, double_quant=double_quant))
    weight = plain.model.layers[1].mlp.up_proj.weight
    codes, state = quantize_4bit(
        weight.detach(), blocksize=block_size, compress_statistics=double_quant, quant_type=kind
    )
    layer = quantized.model.layers[1].mlp.up_proj
    assert torch.equal(layer.weight.data, codes)
    assert torch.equal(quantizer.dequantize(layer), dequantize_4bit(codes, state))


def test_every_linear_layer_but_the_output_head_is_quantized(tiny_model: Path):
    model, _ = load(tiny_model, FourBit(kind="nf4"))
    kinds = {name: type(layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert kinds.pop("lm_head") is nn.Linear
    assert set(kinds.values()) == {bnb.nn.Linear4bit}


@pytest.mark.parametrize(
    ("section", "bits"),
    [
        (FourBit(kind="nf4"), 4.126953125),
        (FourBit(kind="nf4", double_quant=False), 4.5),
        (FourBit(kind="nf4", block_size=128, double_quant=False), 4.25),
    ],
)
def test_declared_bits_are_the_stored_bits(section: FourBit, bits: float):
    quantizer = build(section)
    assert quantizer.bits_per_weight == pytest.approx(bits, abs=1e-9)
    layer = quantizer.empty_layer(1024, 1024, False, torch.float32)
    parameter = quantizer.quantize(layer, torch.randn(1024, 1024))["weight"]
    state = parameter.quant_state
    stored = [parameter.data, state.absmax] + ([state.state2.absmax] if state.nested else [])
    stored_bits = 8 * sum(tensor.numel() * tensor.element_size() for tensor in stored)
    assert stored_bits / 1024**2 == pytest.approx(bits, abs=1e-9)


def lora_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    summed_cross_entropy(model.train(), padded([ROW], 0)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_evaluating_in_between_changes_no_gradient(tiny_model: Path, kind: str):
    """On CPUs with AVX512-BF16 this fails without the guard in FourBitQuantizer: half of the gradients vanish."""
    model, quantizer = load(tiny_model, FourBit(kind=kind))
    model = build(Lora(method="lora", r=4)).attach(model, quantizer, total_steps=1)
    before = lora_gradients(model)
    held_out_loss(model, [ROW], accelerator=Accelerator(cpu=True), compute_dtype=torch.float32, batch_size=1, padding=0)
    after = lora_gradients(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(gradient.abs().max() > 0 for gradient in after.values())


def test_the_guard_is_set_on_every_4_bit_layer(tiny_model: Path):
    model, _ = load(tiny_model, FourBit(kind="nf4"))
    flags = [layer.support_avx512bf16_for_cpu for layer in model.modules() if isinstance(layer, bnb.nn.Linear4bit)]
    assert len(flags) == 14
    assert not any(flags)


@pytest.mark.parametrize("section", [FourBit(kind="nf4"), FourBit(kind="fp4"), EightBit(kind="int8")])
def test_a_dequantized_model_says_what_the_quantized_one_says(tiny_model: Path, section: FourBit | EightBit):
    model, quantizer = load(tiny_model, section)
    ids = torch.tensor([ROW.ids])
    with torch.no_grad():
        quantized = model.eval()(ids).logits
        dequantized = dequantize_model(model, torch.float32)(ids).logits
    # int8 rounds its inputs too; 4-bit layers compute with exactly the dequantized weight.
    tolerance = 2e-2 if quantizer.rounds_activations else 2e-6
    assert (quantized - dequantized).abs().max() <= tolerance * quantized.abs().max()
    assert not any(isinstance(layer, quantizer.layer_type) for layer in model.modules())


def test_a_packed_weight_counts_as_the_weights_it_holds(tiny_model: Path):
    plain, none = load(tiny_model, NoQuantization())
    quantized, quantizer = load(tiny_model, FourBit(kind="nf4"))
    assert count_parameters(quantized).total == count_parameters(plain).total


def test_gpt2_layers_are_quantized_the_right_way_round(tmp_path: Path):
    """GPT-2 stores its weights transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    plain, _ = load(tmp_path / "gpt2", NoQuantization())
    quantized, quantizer = load(tmp_path / "gpt2", EightBit(kind="int8", outlier_threshold=0))
    layer = quantized.transformer.h[0].attn.c_attn
    weight = plain.transformer.h[0].attn.c_attn.weight
    assert torch.allclose(quantizer.dequantize(layer), weight.T, atol=2e-3)
    restored = dequantize_model(quantized, torch.float32).transformer.h[0].attn.c_attn.weight
    assert restored.shape == weight.shape


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_gpu_and_cpu_quantize_to_the_same_codes(kind: str):
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    quantizer = build(FourBit(kind=kind))
    layer = quantizer.empty_layer(256, 256, False, torch.float32)
    on_cpu, on_gpu = (quantizer.quantize(layer, weight.to(device))["weight"].data.cpu() for device in ("cpu", "cuda"))
    assert (on_cpu == on_gpu).float().mean() >= 0.999999

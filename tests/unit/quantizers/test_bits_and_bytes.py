"""bitsandbytes' layers through our Quantizer, and its 4-bit codes against ours."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_4bit, get_4bit_type, quantize_4bit

from finetune.models.linear_layers import dequantize_model
from finetune.quantizers.bits_and_bytes import CudaFourBitQuantizer
from finetune.quantizers.codebook import FLOAT_4, NORMAL_FLOAT, CodebookQuantizer, FourBitQuantizer, dynamic_map
from finetune.recipe.sections.quantization import FourBit, Quantization
from finetune.resolve import build
from tests.unit.quantizers.loading import load, logits, section

WEIGHT = 0.02 * torch.randn(513, 640, generator=torch.Generator().manual_seed(0))
INT8 = section(kind="int8")

every_four_bit = pytest.mark.parametrize(
    "chosen",
    [
        FourBit(kind=kind, block_size=size, double_quant=double)
        for kind in ("nf4", "fp4")
        for size in (64, 128)
        for double in (True, False)
    ],
    ids=lambda chosen: f"{chosen.kind}-{chosen.block_size}-{chosen.double_quant}",
)


def theirs(chosen: FourBit) -> tuple[torch.Tensor, object]:
    return quantize_4bit(
        WEIGHT, blocksize=chosen.block_size, compress_statistics=chosen.double_quant, quant_type=chosen.kind
    )


def test_codebook_tables_match_bitsandbytes():
    assert torch.equal(torch.tensor(NORMAL_FLOAT[4]), get_4bit_type("nf4", device="cpu"))
    assert torch.equal(torch.tensor(FLOAT_4), get_4bit_type("fp4", device="cpu"))
    assert torch.equal(dynamic_map(), create_dynamic_map())


@every_four_bit
def test_four_bit_codes_match_bitsandbytes(chosen: FourBit):
    codes, state = theirs(chosen)
    ours = FourBitQuantizer(chosen).pack(WEIGHT)
    assert (ours["weight"] == codes.flatten()).float().mean() >= 0.999999
    if chosen.double_quant:
        # bitsandbytes' C code for CPUs does not always find the nearest of the 256 values; ours does.
        distance = (ours["absmax"].int() - state.absmax.int()).abs()
        assert distance.max() <= 1
        assert (distance == 0).float().mean() >= 0.99
    else:
        assert torch.equal(ours["absmax"], state.absmax)


@pytest.mark.parametrize("shape", [(96, 64), (33, 37)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_kernels_match_plain_unpacking(kind: str, shape: tuple[int, int]):
    quantizer = FourBitQuantizer(FourBit(kind=kind))
    tensors = quantizer.pack(torch.randn(shape))
    plain = CodebookQuantizer.unpack(quantizer, tensors, *shape)
    assert torch.equal(quantizer.unpack(tensors, *shape), plain)
    assert plain.abs().max() > 1


@every_four_bit
def test_bitsandbytes_codes_dequantize_to_the_same_weights(chosen: FourBit):
    codes, state = theirs(chosen)
    tensors = {"weight": codes.flatten(), "absmax": state.absmax}
    if chosen.double_quant:
        tensors |= {"absmax_scale": state.state2.absmax, "absmax_mean": state.offset}
    assert torch.equal(FourBitQuantizer(chosen).unpack(tensors, *WEIGHT.shape), dequantize_4bit(codes, state))


@every_four_bit
@pytest.mark.parametrize("bias", [True, False])
def test_bitsandbytes_layer_is_repacked_with_the_same_codes(chosen: FourBit, bias: bool):
    """This is how a model that was quantized on CUDA is saved."""
    quantizer = CudaFourBitQuantizer(chosen)
    layer = quantizer.empty_layer(640, 513, bias, torch.float32)
    layer.weight = quantizer.quantize(layer, WEIGHT)["weight"]
    repacked = quantizer.repacked(layer)
    assert torch.equal(repacked.dequantized(torch.float32), quantizer.dequantize(layer))
    assert (repacked.bias is None) == (layer.bias is None)


def test_four_bit_layers_disable_the_avx512_kernel():
    """Without it the first forward pass without gradients on a CPU with AVX512-BF16 spoils all later gradients."""
    layer = CudaFourBitQuantizer(FourBit(kind="nf4")).empty_layer(64, 64, False, torch.float32)
    assert isinstance(layer, bnb.nn.Linear4bit)
    assert layer.support_avx512bf16_for_cpu is False


def test_int8_error_is_at_most_a_step_of_each_row(tiny_model: Path):
    weight = load(tiny_model).model.layers[1].mlp.up_proj.weight
    layer = load(tiny_model, INT8).model.layers[1].mlp.up_proj
    assert isinstance(layer, bnb.nn.Linear8bitLt)
    step = weight.abs().amax(1, keepdim=True) / 127  # and bitsandbytes rounds to float16 first
    assert ((layer.quantizer.dequantize(layer) - weight).abs() <= 0.6 * step).all()


def test_dequantized_int8_model_has_the_logits_of_the_quantized_one_on_a_cpu(tiny_model: Path):
    model = load(tiny_model, INT8)
    quantized = logits(model)
    dequantized = logits(dequantize_model(model, torch.float32))
    assert (quantized - dequantized).abs().max() <= 1e-5 * quantized.abs().max()
    assert not any(isinstance(layer, bnb.nn.Linear8bitLt) for layer in model.modules())


@pytest.mark.parametrize("chosen", [INT8, section(kind="affine", bits=8), section(kind="nf4")], ids=lambda s: s.kind)
def test_gpt2_layers_are_quantized_in_the_right_orientation(tmp_path: Path, chosen: object):
    """GPT-2 stores its weights transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    plain, quantized = load(tmp_path / "gpt2"), load(tmp_path / "gpt2", chosen)
    layer = quantized.transformer.h[0].attn.c_attn
    weight = plain.transformer.h[0].attn.c_attn.weight
    assert torch.allclose(layer.quantizer.dequantize(layer), weight.T, atol=2e-3 if chosen.kind != "nf4" else 2e-2)
    assert (logits(quantized) - logits(plain)).abs().max() < 0.1
    restored = dequantize_model(quantized, torch.float32).transformer.h[0].attn.c_attn.weight
    assert restored.shape == weight.shape


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_gpu_and_cpu_quantize_to_the_same_codes(kind: str, cuda: torch.device):
    on_gpu = build(FourBit(kind=kind))
    assert isinstance(on_gpu, CudaFourBitQuantizer)
    layer = on_gpu.empty_layer(640, 513, False, torch.float32)
    codes = on_gpu.quantize(layer, WEIGHT.to(cuda))["weight"].data.cpu().flatten()
    ours = FourBitQuantizer(FourBit(kind=kind)).pack(WEIGHT)["weight"]
    assert (ours == codes).float().mean() >= 0.99999  # a GPU's fast reciprocal rounds a few ties the other way


@pytest.mark.gpu
@pytest.mark.parametrize(
    "chosen",
    [FourBit(kind="nf4"), section(kind="affine", bits=3), section(kind="icq", candidates=4)],
    ids=lambda chosen: chosen.kind,
)
def test_quantizer_on_gpu_unpacks_to_the_weights_of_the_cpu(chosen: Quantization, device: torch.device):
    quantizer = build(chosen)
    quantizer = getattr(quantizer, "in_torch", quantizer)
    tensors = quantizer.pack(WEIGHT)
    on_device = quantizer.unpack({name: tensor.to(device) for name, tensor in tensors.items()}, *WEIGHT.shape)
    assert torch.allclose(on_device.cpu(), quantizer.unpack(tensors, *WEIGHT.shape), rtol=1e-6, atol=1e-8)


def with_outlier(count: int, width: int) -> torch.Tensor:
    """Rows of which the last has an input beyond the threshold of outliers."""
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(1))
    rows[-1, 3] = 40.0
    return rows


@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_int8_layer_on_a_cpu_computes_the_same_in_training_and_evaluation_whatever_the_batch(
    tiny_model: Path, threshold: float
):
    layer = load(tiny_model, section(kind="int8", outlier_threshold=threshold)).model.layers[0].mlp.up_proj
    rows = with_outlier(6, layer.in_features)
    weight = layer.quantizer.dequantize(layer)
    expected = rows.double() @ weight.double().T
    for is_training in (True, False):
        layer.train(is_training)
        for computed in (layer(rows), torch.cat([layer(row[None]) for row in rows]), layer(rows[None])[0]):
            torch.testing.assert_close(computed.double(), expected, rtol=1e-4, atol=1e-4)
        assert layer.training is is_training


def test_control_layer_of_bitsandbytes_depends_on_the_batch(tiny_model: Path):
    layer = load(tiny_model, INT8).model.layers[0].mlp.up_proj.eval()
    rows = with_outlier(6, layer.in_features)
    theirs = [bnb.nn.Linear8bitLt.forward(layer, each) for each in (rows, rows[:1])]
    assert (theirs[0][0] - theirs[1][0]).abs().max() > 1e-4

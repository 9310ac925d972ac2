"""Invariants of every quantizer with packed codes: size, error, gradients of the dense weight, no weight saved."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from finetune.data.collate import padded
from finetune.errors import UnsupportedError
from finetune.evaluation.loss import compute_validation_loss
from finetune.models.linear_layers import count_parameters, dequantize_model
from finetune.quantizers.layer import QuantizedLinear
from finetune.recipe.sections.quantization import QuantizationSection
from finetune.resolve import build
from tests.fixtures.tiny import write_tiny_model
from tests.unit.quantizers.loading import PACKED, ROW, gradients, load, logits, section, with_lora

every_kind = pytest.mark.parametrize("chosen", PACKED.values(), ids=PACKED)


def gaussian(rows: int = 512, columns: int = 512) -> torch.Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def quantized_layers(model: nn.Module) -> list[QuantizedLinear]:
    return [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]


def layer_of(chosen: QuantizationSection, weight: torch.Tensor, bias: bool = False) -> QuantizedLinear:
    """A layer on its own, as loading makes it."""
    quantizer = build(chosen)
    layer = quantizer.empty_layer(weight.shape[1], weight.shape[0], bias, torch.float32)
    for name, tensor in quantizer.quantize(layer, weight).items():
        setattr(layer, name, tensor)
    if bias:
        layer.bias.data = torch.arange(float(weight.shape[0]))
    return layer


@every_kind
def test_packed_bytes_match_declared_bits(chosen: QuantizationSection):
    weight = gaussian()
    quantizer = build(chosen)
    tensors = quantizer.pack(weight)
    specs = quantizer.tensor_specs(*weight.shape)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {n: tuple(s) for n, s in specs.items()}
    stored = 8 * sum(tensor.nbytes for tensor in tensors.values())
    assert stored == 8 * sum(spec.bytes for spec in specs.values())
    assert stored / weight.numel() == pytest.approx(quantizer.bits_per_weight, rel=0.01)


@pytest.mark.parametrize(
    ("chosen", "bits"),
    [
        (section(kind="nf4"), 4.126953125),
        (section(kind="nf4", double_quant=False), 4.5),
        (section(kind="nf4", block_size=128, double_quant=False), 4.25),
        (section(kind="icq"), 4.25390625),
        (section(kind="icq", bits=2), 2.25390625),
        (section(kind="affine"), 5.0),
        (section(kind="affine", bits=3, scale_dtype="float32", minimum_dtype="float32"), 5.0),
        (section(kind="hqq", bits=2, group_size=64), 2.5),
    ],
    ids=str,
)
def test_declared_bits_match_the_papers(chosen: QuantizationSection, bits: float):
    assert build(chosen).bits_per_weight == pytest.approx(bits, abs=1e-9)


@pytest.mark.parametrize(
    ("chosen", "error"),
    [
        (section(kind="nf4"), 0.0920),
        (section(kind="nf4", double_quant=False), 0.0920),
        (section(kind="icq", candidates=25), 0.0925),
        (section(kind="hqq", bits=4, group_size=64), 0.087),
        (section(kind="hqq", bits=3, group_size=64), 0.184),
        (section(kind="hqq", bits=2, group_size=64), 0.431),
    ],
    ids=str,
)
def test_quantization_error_on_gaussian_weights_matches_published(chosen: QuantizationSection, error: float):
    weight = gaussian()
    restored = layer_of(chosen, weight).dequantized(torch.float32)
    assert float((restored - weight).norm() / weight.norm()) == pytest.approx(error, rel=0.01)


@every_kind
@pytest.mark.parametrize("shape", [(3, 128), (64, 192), (1, 256)], ids=str)
def test_quantizing_dequantized_weights_changes_little(chosen: QuantizationSection, shape: tuple[int, int]):
    """Every shape works: single rows, and weights that are not a multiple of the block size."""
    weight = gaussian(*shape)
    once = layer_of(chosen, weight).dequantized(torch.float32)
    assert once.shape == weight.shape
    assert float((once - weight).norm() / weight.norm()) < 0.65
    assert float((once - weight).abs().max()) <= float(weight.max() - weight.min())


@every_kind
def test_constant_and_zero_weights_are_exact(chosen: QuantizationSection):
    for value in (0.0, 0.5):
        weight = torch.full((4, 256), value)
        assert torch.allclose(layer_of(chosen, weight).dequantized(torch.float32), weight, rtol=5e-3, atol=0)


@every_kind
def test_adapter_gradients_match_those_over_the_dense_weight(tiny_model: Path, chosen: QuantizationSection):
    """ModuLoRA's promise, exactly: the same matmuls in the same order."""
    over_codes = gradients(with_lora(load(tiny_model, chosen)))
    over_dense = gradients(with_lora(dequantize_model(load(tiny_model, chosen), torch.float32)))
    assert len(over_codes) == 2 * 14
    assert over_codes.keys() == over_dense.keys()
    for name, gradient in over_codes.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, over_dense[name]), name
        assert gradient.abs().max() > 0, name


@every_kind
def test_quantized_layer_saves_no_dense_weight_for_backward(chosen: QuantizationSection):
    layer = layer_of(chosen, gaussian(96, 256))
    inputs = torch.randn(2, 3, 256, requires_grad=True)
    saved: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        outputs = layer(inputs)
    outputs.square().sum().backward()
    assert inputs.grad is not None
    assert [tensor.shape for tensor in saved if tensor.is_floating_point() and tensor.numel() >= 96 * 256] == []


def test_saved_tensor_hook_detects_a_dense_weight():
    saved: list[torch.Tensor] = []
    layer = nn.Linear(256, 96, bias=False).requires_grad_(False)
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(2, 256, requires_grad=True))
    assert any(tensor.numel() >= 96 * 256 for tensor in saved)


@every_kind
def test_evaluation_between_steps_changes_no_gradient(tiny_model: Path, chosen: QuantizationSection):
    model = with_lora(load(tiny_model, chosen))
    before = gradients(model)
    settings = {"compute_dtype": torch.float32, "batch_size": 1, "make_batch": partial(padded, padding=0)}
    compute_validation_loss(model, [ROW], accelerator=Accelerator(cpu=True), **settings)
    after = gradients(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_quantized_layer_computes_in_the_dtype_of_its_input(dtype: torch.dtype, autocast: bool):
    layer = layer_of(PACKED["nf4"], gaussian(32, 64), bias=True)
    inputs = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = layer(inputs)
    computed = torch.bfloat16 if autocast else dtype
    assert outputs.dtype == computed
    expected = inputs.to(computed) @ layer.dequantized(computed).T + layer.bias.to(computed)
    assert torch.allclose(outputs, expected, rtol=2e-2, atol=2e-2)
    outputs.sum().backward()
    assert inputs.grad.dtype == dtype
    row_sums = layer.dequantized(computed).float().sum(0).expand(5, -1)
    assert torch.allclose(inputs.grad.float(), row_sums, rtol=2e-2, atol=2e-2)


def test_quantized_layer_gives_no_gradient_to_frozen_inputs():
    layer = layer_of(PACKED["affine-4"], gaussian(32, 64), bias=True)
    layer.bias.requires_grad_(True)
    inputs = torch.randn(5, 64)
    layer(inputs).sum().backward()
    assert inputs.grad is None
    assert torch.equal(layer.bias.grad, torch.full((32,), 5.0))


def test_gradient_checkpointing_changes_no_gradient(tiny_model: Path):
    model = with_lora(load(tiny_model, PACKED["nf4"]))
    plain = gradients(model)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients(model)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_adapter_over_a_bfloat16_model_stays_in_float32(tiny_model: Path):
    model = with_lora(load(tiny_model, PACKED["nf4"], torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["nf4", "affine-3", "affine-8", "hqq-4", "icq-4"])
@pytest.mark.parametrize("safe", [True, False])
def test_peft_merge_into_quantized_layers_raises(tiny_model: Path, name: str, safe: bool):
    model = with_lora(load(tiny_model, PACKED[name]))
    layer = quantized_layers(model)[0]
    before = layer.weight.clone()
    with pytest.raises(RuntimeError):
        model.merge_and_unload(safe_merge=safe)
    assert torch.equal(layer.weight, before)


def test_codes_are_independent_of_the_weight_dtype(tiny_model: Path):
    """A base trained over in bfloat16 is merged in float32: its codes must be the same."""
    in_full, in_half = (quantized_layers(load(tiny_model, PACKED["nf4"], d)) for d in (torch.float32, torch.bfloat16))
    for one, other in zip(in_full, in_half, strict=True):
        assert all(torch.equal(tensor, other.packed()[name]) for name, tensor in one.packed().items())


@every_kind
def test_every_linear_layer_except_the_head_is_quantized(tiny_model: Path, chosen: QuantizationSection):
    model = load(tiny_model, chosen)
    kinds = {name: type(layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert kinds.pop("lm_head") is nn.Linear
    assert len(kinds) == 14
    assert set(kinds.values()) == {QuantizedLinear}


@every_kind
def test_dequantized_model_has_the_logits_of_the_quantized_one(tiny_model: Path, chosen: QuantizationSection):
    model = load(tiny_model, chosen)
    quantized = logits(model)
    assert torch.equal(logits(dequantize_model(model, torch.float32)), quantized)
    assert quantized_layers(model) == []


def test_packed_weight_counts_as_its_unpacked_elements(tiny_model: Path):
    counts = {count_parameters(load(tiny_model, PACKED[name])).total for name in ("nf4", "affine-3", "icq-4")}
    assert counts == {count_parameters(load(tiny_model)).total}


def test_group_size_that_does_not_divide_the_inputs_names_the_layer(tmp_path: Path):
    write_tiny_model(tmp_path / "odd", intermediate_size=80)
    with pytest.raises(UnsupportedError) as caught:
        load(tmp_path / "odd", PACKED["affine-4"])
    assert "model.layers.0.mlp.down_proj" in str(caught.value)
    assert "80 inputs" in str(caught.value)

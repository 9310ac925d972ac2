"""DoRA: the magnitude trains in 16 bits; the reference is the paper's formula in float64.

Source: Liu et al. 2024, arXiv 2402.09353, equation 5.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune.adapters.base import trainable
from finetune.adapters.lora import LoraMethod
from finetune.adapters.low_rank import LowRankLinear
from finetune.adapters.peft_bridge import low_rank_layers
from finetune.quantizers.base import Quantizer
from finetune.recipe.sections.adapter import Lora
from finetune.recipe.sections.quantization import Quantization
from finetune.resolve import build
from tests.fixtures.tiny import tiny_llama
from tests.unit.quantizers.loading import PACKED

TOKENS, INPUTS, OUTPUTS = 1500, 64, 128


def layer_over(base: str, bias: bool = False) -> LowRankLinear:
    """A DoRA layer whose update is not zero and whose magnitude is the norm of its rows."""
    torch.manual_seed(0)
    model = tiny_llama().to(torch.bfloat16).requires_grad_(False)
    block = model.model.layers[0].mlp
    if bias:
        block.gate_proj.bias = nn.Parameter(0.1 * torch.randn(OUTPUTS, dtype=torch.bfloat16), requires_grad=False)
    if base != "plain":
        block.gate_proj = _quantized(block.gate_proj, base)
    method = LoraMethod(Lora(method="lora", r=4, dora=True, target_modules=["gate_proj"]))
    layer = low_rank_layers(method.attach(model, 1))["model.layers.0.mlp.gate_proj"]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(0, 0.02)
        layer.lora_magnitude_vector["default"].weight.copy_(layer._row_norms("default"))
    return layer


def _quantized(layer: nn.Linear, kind: str) -> nn.Module:
    section = PACKED[kind] if kind in PACKED else TypeAdapter(Quantization).validate_python({"kind": kind})
    quantizer: Quantizer = build(section)
    empty = quantizer.empty_layer(layer.in_features, layer.out_features, False, torch.bfloat16)
    for name, tensor in quantizer.quantize(empty, layer.weight.detach().float()).items():
        setattr(empty, name, tensor)
    empty.quantizer = quantizer
    return empty


def reference(layer: LowRankLinear, x: Tensor) -> Tensor:
    """m (W + s B A) x / |W + s B A| + b in float64."""
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    adapted = layer.base_weight().double() + layer.scaling["default"] * b @ a
    magnitude = layer.lora_magnitude_vector["default"].weight.double()
    bias = layer.get_base_layer().bias
    product = x.double() @ (magnitude[:, None] * adapted / adapted.norm(dim=1, keepdim=True)).T
    return product if bias is None else product + bias.double()


@pytest.mark.parametrize("growth", [0.001, -0.001, 0.02])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16 input"])
@pytest.mark.parametrize("gradients", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("base", ["plain", "nf4", "affine-4", "int8"])
def test_growth_of_magnitude_reaches_the_output_in_bfloat16(base: str, gradients: bool, autocast: bool, growth: float):
    layer = layer_over(base).train(gradients)
    x = torch.randn(TOKENS, INPUTS)
    x = x if autocast and base != "int8" else x.to(torch.bfloat16)
    outputs, expected = [], []
    for factor in (1.0, 1.0 + growth):
        with torch.no_grad():
            layer.lora_magnitude_vector["default"].weight.mul_(factor)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(gradients):
            found = layer(x).detach()
        assert found.dtype is torch.bfloat16
        outputs.append(found.double())
        expected.append(reference(layer, x).detach())
    change, right = outputs[1] - outputs[0], expected[1] - expected[0]
    # Each output is rounded to 8 bits, the change of all of them together is not.
    assert float((change * right).sum() / (right * right).sum()) == pytest.approx(1, abs=0.05)
    tolerance = 0.05 if base == "int8" else 0.01  # int8 rounds its input too
    assert (outputs[1] - expected[1]).norm() <= tolerance * expected[1].norm()


@pytest.mark.gpu
def test_growth_of_magnitude_reaches_the_output_on_a_gpu(cuda: torch.device):
    layer = layer_over("plain").train().to(cuda)
    x = torch.randn(TOKENS, INPUTS, device=cuda)
    outputs, expected = [], []
    for factor in (1.0, 1.001):
        with torch.no_grad():
            layer.lora_magnitude_vector["default"].weight.mul_(factor)
        with torch.autocast("cuda", torch.bfloat16):
            outputs.append(layer(x).detach().double())
        expected.append(reference(layer, x).detach())
    change, right = outputs[1] - outputs[0], expected[1] - expected[0]
    assert float((change * right).sum() / (right * right).sum()) == pytest.approx(1, abs=0.05)


def test_control_a_product_in_bfloat16_loses_the_growth():
    x, weight = torch.randn(TOKENS, INPUTS).bfloat16(), torch.randn(OUTPUTS, INPUTS).bfloat16()
    product = x @ weight.T
    assert torch.equal((product * torch.tensor(1.001)).bfloat16(), product)  # the factor in float32
    assert torch.equal(product * torch.tensor([1.001]).bfloat16(), product)  # and in bfloat16


@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16_gradients_equal_those_of_the_formula(bias: bool):
    layer = layer_over("plain", bias).train()
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(1 + 0.1 * torch.rand(OUTPUTS))
    x = torch.randn(TOKENS, INPUTS, requires_grad=True)
    weights = torch.randn(TOKENS, OUTPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        (layer(x) * weights).sum().backward()
    a, b = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    magnitude = layer.lora_magnitude_vector["default"].weight
    found = {name: each.grad.double() for name, each in {"a": a, "b": b, "m": magnitude, "x": x}.items()}
    exact = {
        name: each.detach().double().requires_grad_() for name, each in {"a": a, "b": b, "m": magnitude, "x": x}.items()
    }
    adapted = layer.base_weight().double() + layer.scaling["default"] * exact["b"] @ exact["a"]
    norms = adapted.detach().norm(dim=1)  # constants for the gradient
    product = exact["x"] @ adapted.T * exact["m"] / norms
    (product * weights.double()).sum().backward()
    for name, tensor in exact.items():
        assert (found[name] - tensor.grad).norm() <= 0.02 * tensor.grad.norm(), name


def test_trained_magnitude_changes_the_loss_as_the_formula_says():
    """All layers grow by 0.1 %: the mean of the logits' change in bfloat16 is that of float32."""
    changes = []
    for dtype in (torch.float32, torch.bfloat16):
        model = LoraMethod(Lora(method="lora", r=4, dora=True)).attach(tiny_llama().to(dtype), 1).eval()
        ids = torch.arange(300).view(2, 150)
        logits = []
        for factor in (1.0, 1.01):
            with torch.no_grad():
                for name, parameter in trainable(model).items():
                    if "magnitude" in name:
                        parameter.mul_(factor)
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                    logits.append(model(input_ids=ids).logits.double())
        changes.append(logits[1] - logits[0])
    exact, found = changes
    assert float((exact * found).sum() / (exact * exact).sum()) == pytest.approx(1, abs=0.05)


def tied_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, **off)).eval()


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "c_attn"], ["lm_head", "q_proj"]], ids=str)
def test_tied_head_computes_the_formula_as_stock_peft_does(targets: list[str], dora: bool, tmp_path: Path):
    """The head has its own update; the embeddings that it is tied to stay as they are. In float64."""
    base = (tiny_llama() if "q_proj" in targets else tied_gpt2()).eval()
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight
    method = LoraMethod(Lora(method="lora", r=4, dora=dora, target_modules=targets))
    model = method.attach(deepcopy(base), 1).eval()
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    method.save(model, tmp_path)
    stock = PeftModel.from_pretrained(deepcopy(base), tmp_path).eval()
    exact = deepcopy(base).double()
    for name, layer in low_rank_layers(model).items():
        module = exact.get_submodule(name)
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        weight = (module.weight.T if isinstance(module, Conv1D) else module.weight) + layer.scaling["default"] * b @ a
        if dora:
            magnitude = layer.lora_magnitude_vector["default"].weight.double()
            weight = magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
        module.weight = nn.Parameter((weight.T if isinstance(module, Conv1D) else weight).contiguous())
    ids = torch.arange(30)[None]
    with torch.no_grad():
        expected = exact(input_ids=ids).logits
        for found in (model, stock):
            assert (found(input_ids=ids).logits - expected).norm() <= 1e-5 * expected.norm()
        assert (base(input_ids=ids).logits - expected).norm() > 1e-2 * expected.norm()


def test_row_of_zeros_trains_from_zero():
    """Such as that of a padding token in a head that is tied to the embeddings; its magnitude and its norm are 0."""
    torch.manual_seed(0)
    model = tiny_llama().requires_grad_(False)
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[3] = 0
    attached = LoraMethod(Lora(method="lora", r=4, dora=True, target_modules=["gate_proj"])).attach(model, 1)
    layer = low_rank_layers(attached)["model.layers.0.mlp.gate_proj"]
    x, optimizer = torch.randn(TOKENS, INPUTS), torch.optim.SGD(trainable(layer).values(), lr=1e-2)
    wanted = torch.randn(TOKENS, OUTPUTS)
    torch.testing.assert_close(layer(x), layer.get_base_layer()(x))
    losses = []
    for _ in range(40):
        loss = (layer(x) - wanted)[:, 3].square().mean()
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in trainable(layer).values())
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    torch.testing.assert_close(layer(x).double(), reference(layer, x), rtol=1e-4, atol=1e-5)


def test_control_quotient_of_zeros_is_not_a_number():
    row = torch.zeros(8)
    assert (row.norm() / row.norm()).isnan()

"""LoRA variants: initial state, formula, and equality with stock PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from finetune.adapters.initialization import Factors
from finetune.adapters.lora import LoraMethod
from finetune.adapters.peft_bridge import low_rank_layers
from finetune.models.linear_layers import dequantize_model
from finetune.models.loading.model_files import ModelFolder
from finetune.recipe.sections.adapter import Lora
from finetune.recipe.sections.modules import ModuleRule
from tests.fixtures.merge_helpers import merged
from tests.fixtures.one_device import OneDevice
from tests.fixtures.tiny import tiny_llama, tiny_tokenizer
from tests.unit.adapters.test_low_rank import is_close, trained
from tests.unit.quantizers.loading import PACKED, PLAIN, gradients, load, logits

VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "pissa": {"initialization": "pissa"},
    "olora": {"initialization": "olora", "rslora": True},
    "loftq": {"initialization": "loftq"},
    "loftq-dora": {"initialization": "loftq", "dora": True},
}
BASES = [None, "nf4", "affine-3", "icq-4"]


def method(name: str, **more: Any) -> LoraMethod:
    return LoraMethod(Lora(**{"method": "lora", "r": 4, "alpha": 8, **VARIANTS[name], **more}))


def attached(name: str, folder: Path, kind: str | None, **more: Any) -> torch.nn.Module:
    chosen = method(name, **more)
    model = chosen.attach(load(folder, PACKED[kind]) if kind else load(folder), 1)
    chosen.initialize(model, ModelFolder(folder, "base").weight)
    return model


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("name", [name for name in VARIANTS if "loftq" not in name])
def test_variant_initially_matches_base(tiny_model: Path, name: str, kind: str | None):
    plain = logits(load(tiny_model, PACKED[kind]) if kind else load(tiny_model))
    assert is_close(logits(attached(name, tiny_model, kind)), plain, 1e-5)


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_dora_initially_matches_bfloat16_base_bitwise(tiny_model: Path, kind: str | None):
    def base() -> torch.nn.Module:
        return load(tiny_model, PACKED[kind] if kind else PLAIN, torch.bfloat16)

    attached = method("dora").attach(base(), 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(attached), logits(base()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_difference_layer_initial_values_are_frozen(tiny_model: Path, dtype: torch.dtype):
    model = method("pissa").attach(load(tiny_model, PLAIN, dtype), 1)
    trains = {name.split(".")[-3] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {"lora_A", "lora_B"}


@pytest.mark.parametrize("kind", ["nf4", "affine-3", "icq-4"])
def test_loftq_reduces_initial_quantization_error(tiny_model: Path, kind: str):
    model = attached("loftq", tiny_model, kind)
    for name, layer in low_rank_layers(model).items():
        original = ModelFolder(tiny_model, "base").weight(name)
        before = (layer.base_weight() - original).norm()
        after = (layer.base_weight() + layer.get_delta_weight("default") - original).norm()
        assert after < 0.98 * before
        singular = torch.linalg.svdvals(original - layer.base_weight())
        assert is_close(after, singular[4:].norm(), 1e-4)  # the optimum for rank 4


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its linear layers are Conv1D, whose weight is (in, out); the one after attention is square."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=64, n_layer=1, n_head=4)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["nf4", "affine-3", "icq-4"])
def test_loftq_over_conv1d_is_the_best_approximation_of_the_quantization_error(gpt2: Path, kind: str):
    """By Eckart and Young: the error that remains is that of the singular values after the rank, in float64."""
    model = attached("loftq", gpt2, kind)
    layers = low_rank_layers(model)
    assert {tuple(layer.base_weight().shape) for layer in layers.values()} > {(64, 64), (192, 64), (64, 256)}
    stored = load_file(gpt2 / "model.safetensors")
    for name, layer in layers.items():
        error = stored[f"{name}.weight"].T.double() - layer.base_weight().double()
        left = error - layer.scaling["default"] * (
            layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        )
        assert float(left.norm()) == pytest.approx(float(torch.linalg.svdvals(error)[4:].norm()), rel=1e-4)


def test_pissa_trains_the_largest_singular_vectors(tiny_model: Path):
    layer = low_rank_layers(attached("pissa", tiny_model, None))["model.layers.0.self_attn.q_proj"]
    product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    u, s, v = torch.linalg.svd(layer.base_weight())
    assert is_close(product, u[:, :4] @ s[:4].diag() @ v[:4], 1e-4)


def test_olora_starts_orthonormal(tiny_model: Path):
    layer = low_rank_layers(attached("olora", tiny_model, None))["model.layers.0.self_attn.q_proj"]
    b = layer.lora_B["default"].weight
    assert is_close(b.T @ b, torch.eye(4), 1e-5)


def test_rslora_scales_by_the_root_of_the_rank(tiny_model: Path):
    layer = next(iter(low_rank_layers(attached("rslora", tiny_model, None)).values()))
    assert layer.scaling["default"] == 8 / 2


@pytest.mark.parametrize("bias", [False, True])
def test_dora_matches_formula(tiny_model: Path, bias: bool):
    """Against the formula written out: m (W + s B A) x / |W + s B A|, with its gradient with the norms as constants."""
    model = trained(attached("dora", tiny_model, "affine-3"))
    layer = low_rank_layers(model)["model.layers.1.mlp.gate_proj"]
    if bias:
        layer.get_base_layer().bias = torch.nn.Parameter(torch.randn(layer.out_features))
    adapted = layer.base_weight() + layer.get_delta_weight("default")
    x = torch.randn(3, layer.in_features)
    magnitude = layer.lora_magnitude_vector["default"].weight
    expected = x @ (magnitude[:, None] * adapted / adapted.norm(dim=1, keepdim=True)).T
    if bias:
        expected = expected + layer.get_base_layer().bias
    assert is_close(layer(x), expected, 1e-4)
    assert is_close(adapted.norm(dim=1), layer._row_norms("default"), 1e-5)


@pytest.mark.parametrize("kind", [None, "nf4"])
@pytest.mark.parametrize("name", VARIANTS)
def test_saved_variant_gives_same_logits_in_stock_peft_and_merged(
    tiny_model: Path, tmp_path: Path, name: str, kind: str | None
):
    if kind is None and "loftq" in name:
        pytest.skip("loftq is for quantized bases")

    def base() -> torch.nn.Module:
        return load(tiny_model, PACKED[kind]) if kind else load(tiny_model)

    chosen = method(name)
    model = attached(name, tiny_model, kind)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.02 * torch.randn(parameter.shape))
    expected = logits(model)
    chosen.save(model, tmp_path)
    assert torch.equal(logits(chosen.load(base(), tmp_path)), expected)
    plain = dequantize_model(base(), torch.float32)
    assert not is_close(logits(plain), expected, 1e-2)
    assert is_close(logits(peft.PeftModel.from_pretrained(plain, tmp_path).eval()), expected)
    assert is_close(logits(merged(chosen, dequantize_model(base(), torch.float32), tmp_path)), expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_has_gradients_for_trainable_parameters_only(tiny_model: Path, name: str):
    found = gradients(trained(attached(name, tiny_model, "nf4")).train())
    kinds = {part for gradient in found for part in gradient.split(".") if part.startswith("lora_")}
    assert kinds == {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if "dora" in name else set())
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


def test_module_rules_apply_to_variants(tiny_model: Path, tmp_path: Path):
    rules = [
        ModuleRule(match="*.down_proj", adapter={"r": 2}),
        ModuleRule(match="*.q_proj", adapter={"skip": True}),
    ]
    chosen = LoraMethod(Lora(method="lora", r=4, alpha=8, initialization="pissa"), rules)
    model = chosen.attach(load(tiny_model), 1)
    chosen.initialize(model, ModelFolder(tiny_model, "base").weight)
    model = trained(model)
    chosen.save(model, tmp_path)
    assert torch.equal(logits(chosen.load(load(tiny_model), tmp_path)), logits(model))
    assert is_close(logits(peft.PeftModel.from_pretrained(load(tiny_model), tmp_path).eval()), logits(model))
    assert is_close(logits(merged(chosen, load(tiny_model), tmp_path)), logits(model))


def test_loftq_of_a_base_on_another_device_reads_original_weights_from_the_cpu(monkeypatch: pytest.MonkeyPatch):
    errors: list[torch.Tensor] = []

    def no_decomposition(error_OI: torch.Tensor, r: int) -> Factors:
        errors.append(error_OI)
        return Factors(error_OI.new_empty(r, error_OI.shape[1]), error_OI.new_empty(error_OI.shape[0], r))

    monkeypatch.setattr("finetune.adapters.lora.principal", no_decomposition)
    monkeypatch.setattr("finetune.adapters.lora.is_quantized", lambda layer: True)
    chosen = method("loftq")
    model = chosen.attach(tiny_llama(), 1)
    layers = low_rank_layers(model)
    originals = {name: layer.base_weight().bfloat16() for name, layer in layers.items()}
    model.to("meta")
    with OneDevice():
        chosen.initialize(model, originals.__getitem__)
    assert len(errors) == len(layers)
    assert {(error.device.type, error.dtype) for error in errors} == {("meta", torch.float32)}


def test_loftq_layer_that_is_not_quantized_starts_as_plain_lora(tiny_model: Path):
    """Its quantization error is zero, and two factors of zero would never get a gradient."""
    chosen = LoraMethod(Lora(method="lora", r=4, initialization="loftq", target_modules=["q_proj", "lm_head"]))
    base = load(tiny_model, PACKED["nf4"])
    model = chosen.attach(base, 1)
    chosen.initialize(model, ModelFolder(tiny_model, str(tiny_model)).weight)
    layers = low_rank_layers(model)
    head, quantized = layers["lm_head"], layers["model.layers.0.self_attn.q_proj"]
    assert not head.lora_B["default"].weight.any()
    assert head.lora_A["default"].weight.std() > 0.01
    assert quantized.lora_B["default"].weight.any()

"""QA-LoRA and IR-QLoRA's elastic connection (IEC), as published, alone and combined, at every number of bits."""

from __future__ import annotations

from math import gcd
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetune.adapters.lora import LoraMethod, LowRankMethod
from finetune.adapters.low_rank import IecLinear, LowRankLinear
from finetune.adapters.qa_lora import QaLoraMethod
from finetune.errors import UnsupportedError
from finetune.models.linear_layers import dequantize_model, linear_layers
from finetune.models.loading.quantized_checkpoint import save_quantized
from finetune.quantizers.layer import QuantizedLinear
from finetune.recipe.sections.adapter import Lora, QaLora
from finetune.recipe.sections.modules import ModuleRule
from tests.fixtures.merge_helpers import merged, merged_quantized
from tests.unit.quantizers.loading import PACKED, gradients, load, logits, section

GROUPED = ["affine-2", "affine-3", "affine-4", "hqq-2", "hqq-3", "hqq-4"]
ICQ = ["icq-2", "icq-3", "icq-4"]


def qa_lora(rules: list[ModuleRule] | None = None, **settings: Any) -> QaLoraMethod:
    return QaLoraMethod(QaLora(**{"method": "qa_lora", "r": 4, "alpha": 8, **settings}), rules or [])


def lora(rules: list[ModuleRule] | None = None, **settings: Any) -> LoraMethod:
    return LoraMethod(Lora(**{"method": "lora", "r": 4, "alpha": 8, **settings}), rules or [])


def trained(model: nn.Module) -> nn.Module:
    """Simulate training: no value of the adapter is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def low_rank_layers(model: nn.Module) -> list[LowRankLinear]:
    return [layer for layer in model.modules() if isinstance(layer, LowRankLinear)]


def alone(in_features: int, out_features: int, r: int, *, iec: bool = True, dropout: float = 0.0) -> LowRankLinear:
    """One adapted layer in float64."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout)
    kind = IecLinear if iec else LowRankLinear
    layer = kind(nn.Linear(in_features, out_features), "default", config, r=r, lora_alpha=2 * r)
    return trained(layer).double()


def is_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


# QA-LoRA


@pytest.mark.parametrize("iec", [False, True])
@pytest.mark.parametrize("kind", GROUPED)
def test_qa_lora_merge_changes_only_minimums_and_is_exact(tiny_model: Path, tmp_path: Path, kind: str, iec: bool):
    model = load(tiny_model, PACKED[kind])
    plain = logits(model)
    before = {name: {key: t.clone() for key, t in layer.packed().items()} for name, layer in quantized(model).items()}
    method = qa_lora(iec=iec)
    attached = trained(method.attach(model, 1))
    expected = logits(attached)
    method.save(attached, tmp_path / "adapter")
    model = merged_quantized(method, load(tiny_model, PACKED[kind]), tmp_path / "adapter")
    after = {name: layer.packed() for name, layer in quantized(model).items()}
    assert is_close(logits(model), expected)
    assert not is_close(plain, expected, 1e-2)  # the update matters
    assert before.keys() == after.keys()
    for name, tensors in before.items():
        assert torch.equal(after[name]["weight"], tensors["weight"])
        assert torch.equal(after[name]["scale"], tensors["scale"])
        assert after[name]["minimum"].dtype is torch.float32
    save_quantized(model, tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(model))


def quantized(model: nn.Module) -> dict[str, QuantizedLinear]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    return {name.removesuffix(".base_layer"): layer for name, layer in layers.items()}


def test_qa_lora_merge_is_exact_in_float64(tiny_model: Path):
    attached = trained(qa_lora(iec=True).attach(load(tiny_model, PACKED["affine-4"]), 1))
    layer = low_rank_layers(attached)[0]
    base = layer.get_base_layer()
    x = torch.randn(5, base.in_features, dtype=torch.float64)
    a_RL, b_OR = (factor.double() for factor in layer.double().group_factors("default"))
    minimum = base.minimum.double() + b_OR @ a_RL * layer.scaling["default"]
    codes_OGK = (base.dequantized(torch.float32).double().unflatten(1, (-1, 32)) - base.minimum.double()[..., None]) / (
        base.scale.double()[..., None]
    )
    merged = (codes_OGK * base.scale.double()[..., None] + minimum[..., None]).flatten(1)
    expected = x @ base.dequantized(torch.float32).double().T + layer.update("default", x)
    assert is_close(x @ merged.T, expected, 1e-12)


def test_qa_lora_has_r_times_groups_plus_outputs_parameters(tiny_model: Path):
    model = load(tiny_model, PACKED["affine-4"])
    expected = sum(4 * (layer.in_features // 32 + layer.out_features) for layer in quantized(model).values())
    attached = qa_lora().attach(model, 1)
    assert sum(p.numel() for p in attached.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize("iec", [False, True])
def test_qa_lora_update_is_constant_within_groups(tiny_model: Path, iec: bool):
    attached = trained(qa_lora(iec=iec).attach(load(tiny_model, PACKED["hqq-4"]), 1))
    for layer in low_rank_layers(attached):
        delta_OGK = layer.get_delta_weight("default").unflatten(1, (-1, layer.group_size))
        assert torch.equal(delta_OGK, delta_OGK[..., :1].expand_as(delta_OGK))
    layer = low_rank_layers(attached)[0]
    x = torch.randn(3, layer.get_base_layer().in_features)
    assert is_close(layer.update("default", x), x @ layer.get_delta_weight("default").T, 1e-5)
    if not iec:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert torch.allclose(layer.update("default", x), 2.0 * x.unflatten(1, (-1, 32)).sum(2) @ a.T @ b.T, atol=1e-5)


def test_qa_lora_initial_a_has_scale_of_equivalent_lora(tiny_model: Path):
    grouped = low_rank_layers(qa_lora(r=64).attach(load(tiny_model, PACKED["affine-4"]), 1))
    plain = low_rank_layers(lora(r=64).attach(load(tiny_model, PACKED["affine-4"]), 1))
    for one, other in zip(grouped, plain, strict=True):
        spread, expected = (float(layer.factors("default").a_RI.detach().std()) for layer in (one, other))
        assert spread == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("kind", ["nf4", "icq-4", None])
def test_qa_lora_refuses_base_without_groups(tiny_model: Path, kind: str | None):
    model = load(tiny_model, PACKED[kind]) if kind else load(tiny_model)
    with pytest.raises(UnsupportedError, match=r"the layer model\.layers\.0\.\S+_proj does not have"):
        qa_lora().attach(model, 1)


def test_lora_merge_into_quantized_weights_is_refused(tiny_model: Path):
    model = lora().attach(load(tiny_model, PACKED["affine-4"]), 1)
    with pytest.raises(UnsupportedError, match="without rounding"):
        lora().merge_quantized(low_rank_layers(model)[0])


# IEC


@pytest.mark.parametrize(("in_features", "out_features", "r"), [(24, 36, 8), (30, 14, 4), (7, 5, 3), (16, 16, 16)])
def test_iec_matches_equation_16_and_merges_into_two_factors(in_features: int, out_features: int, r: int):
    """Against equation 16 written out entry by entry."""
    layer = alone(in_features, out_features, r)
    x = torch.randn(6, in_features, dtype=torch.float64)
    a, b = layer.lora_A["default"].weight.clone(), layer.lora_B["default"].weight.clone()
    beta1, beta2 = layer.lora_beta["default"].tolist()
    g1, g2 = gcd(in_features, r), gcd(out_features, r)
    with torch.no_grad():
        for j in range(r):
            for i in range(in_features):
                a[j, i] += beta1 * g1 / in_features * (i // (in_features // g1) == j // (r // g1))
            for o in range(out_features):
                b[o, j] += beta2 * g2 / r * (j // (r // g2) == o // (out_features // g2))
    expected = 2.0 * x @ a.T @ b.T
    assert is_close(layer.update("default", x), expected, 1e-10)
    factors = layer.factors("default")
    assert is_close(factors.a_RI, a, 1e-12)
    assert is_close(factors.b_OR, b, 1e-12)
    without = alone(in_features, out_features, r, iec=False)
    assert not is_close(without.update("default", x), expected, 1e-3)


def test_iec_path_has_no_dropout():
    layer = alone(16, 12, 4, dropout=0.5).train()
    with torch.no_grad():
        layer.lora_A["default"].weight.zero_()
    x = torch.randn(8, 16, dtype=torch.float64)
    assert torch.equal(layer.update("default", x), layer.eval().update("default", x))


@pytest.mark.parametrize("kind", ICQ)
def test_untrained_iec_keeps_logits(tiny_model: Path, kind: str):
    model = load(tiny_model, PACKED[kind])
    before = logits(model)
    assert torch.equal(logits(lora(iec=True).attach(model, 1)), before)


def test_iec_betas_have_gradients(tiny_model: Path):
    attached = lora(iec=True).attach(load(tiny_model, PACKED["icq-4"]), 1)
    found = gradients(trained(attached))
    betas = [gradient for name, gradient in found.items() if "lora_beta" in name]
    assert len(betas) == 14
    assert all((gradient != 0).all() for gradient in betas)


# What is saved


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        *((lora(iec=True), kind) for kind in ICQ),
        (lora(iec=True), "affine-4"),
        (qa_lora(), "affine-3"),
        (qa_lora(), "hqq-2"),
        (qa_lora(iec=True), "hqq-4"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.section.method}-{value.section.iec}",
)
def test_saved_adapter_gives_same_logits_in_stock_peft(
    tiny_model: Path, tmp_path: Path, method: LowRankMethod, kind: str
):
    """Stock PEFT needs the dequantized base; the native tensors under its formula would be another model."""
    attached = trained(method.attach(load(tiny_model, PACKED[kind]), 1))
    expected = logits(attached)
    method.save(attached, tmp_path)
    assert torch.equal(logits(method.load(load(tiny_model, PACKED[kind]), tmp_path)), expected)

    def in_stock_peft() -> torch.Tensor:
        base = dequantize_model(load(tiny_model, PACKED[kind]), torch.float32)
        return logits(peft.PeftModel.from_pretrained(base, tmp_path).eval())

    assert is_close(in_stock_peft(), expected)
    if method.section.method == "lora":
        native = load_file(tmp_path / "ft_adapter.safetensors")
        save_file({k: t for k, t in native.items() if "beta" not in k}, tmp_path / "adapter_model.safetensors")
        assert not is_close(in_stock_peft(), expected, 1e-3)


@pytest.mark.parametrize(
    ("method", "kind"), [(lora(iec=True), "icq-3"), (lora(iec=True), "affine-2"), (qa_lora(iec=True), "hqq-3")]
)
def test_adapter_merges_into_dequantized_base(tiny_model: Path, tmp_path: Path, method: LowRankMethod, kind: str):
    attached = trained(method.attach(load(tiny_model, PACKED[kind]), 1))
    method.save(attached, tmp_path)
    base = dequantize_model(load(tiny_model, PACKED[kind]), torch.float32)
    assert is_close(logits(merged(method, base, tmp_path)), logits(attached), 1e-5)


# Single layers


def test_module_rules_set_rank_and_scale_or_skip_layers(tiny_model: Path, tmp_path: Path):
    rules = [
        ModuleRule(match="*.layers.0.mlp.*", adapter={"skip": True}),
        ModuleRule(match="*.down_proj", adapter={"r": 2, "alpha": 6}),
        ModuleRule(match="*.q_pro?", adapter={"alpha": 1}),
    ]
    model = load(tiny_model)
    names = linear_layers(model).keys() - {"lm_head"}
    attached = trained(lora(rules).attach(model, 1))
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in attached.named_modules()
        if isinstance(layer, LowRankLinear)
    }
    assert names - layers.keys() == {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    found = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()}
    assert found["model.layers.1.mlp.down_proj"] == (2, 3.0)
    assert found["model.layers.1.self_attn.q_proj"] == (4, 0.25)
    assert found["model.layers.1.self_attn.k_proj"] == (4, 2.0)
    lora(rules).save(attached, tmp_path)
    assert torch.equal(logits(lora(rules).load(load(tiny_model), tmp_path)), logits(attached))
    assert is_close(logits(peft.PeftModel.from_pretrained(load(tiny_model), tmp_path).eval()), logits(attached), 1e-6)


def test_module_rules_set_quantizer_of_layers(tiny_model: Path, tmp_path: Path):
    rules = [
        ModuleRule(match="*.down_proj", quantization=section(kind="hqq", bits=8)),
        ModuleRule(match="*.layers.0.*", quantization=section(kind="none")),
    ]
    model = load(tiny_model, section(kind="affine", bits=2), rules=rules)
    kinds = {name: layer.quantizer.section.kind for name, layer in quantized(model).items()}
    assert len(kinds) == 8  # all seven of layer 1, one of layer 0
    assert {name for name, kind in kinds.items() if kind == "hqq"} == {
        f"model.layers.{n}.mlp.down_proj" for n in (0, 1)
    }
    save_quantized(model, tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))

"""`lora_linear` equals its reference implementation in loss and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from finetune.adapters import low_rank
from finetune.adapters.base import trainable
from finetune.adapters.lora_linear import LoraTerm, is_fusable, lora_linear, lora_linear_reference
from finetune.adapters.low_rank import LowRankLinear
from finetune.recipe.sections.adapter import Adapter
from finetune.resolve import build
from tests.fixtures.tiny import tiny_llama
from tests.unit.quantizers.loading import PACKED, load

METHODS: dict[str, tuple[dict[str, Any], str | None]] = {
    "lora": ({"method": "lora"}, None),
    "rslora": ({"method": "lora", "rslora": True}, None),
    "dora": ({"method": "lora", "dora": True}, None),
    "pissa": ({"method": "lora", "initialization": "pissa"}, None),
    "attention only": ({"method": "lora", "target_modules": ["q_proj", "v_proj"]}, None),
    "qlora": ({"method": "lora"}, "nf4"),
    "ir-qlora": ({"method": "lora", "iec": True}, "icq-4"),
    "modulora": ({"method": "lora"}, "optq-3"),
    "qa-lora": ({"method": "qa_lora"}, "affine-4"),
    "qa-lora and iec": ({"method": "qa_lora", "iec": True}, "affine-4"),
    "adalora": ({"method": "adalora", "r": 6, "target_r": 4, "initial_steps": 1, "final_steps": 1}, None),
}


def attached(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with an adapter without zeros."""
    section, quantization = METHODS[kind]
    recipe = TypeAdapter(Adapter).validate_python({"r": 4, **section})
    method = build(recipe, [], None)
    base = tiny_llama() if quantization is None else load(folder, PACKED[quantization])
    model = method.attach(base.to(dtype) if quantization is None else base, 10)
    method.initialize(model, lambda name: None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def results(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    ids = torch.randint(320, (2, 21), generator=torch.Generator().manual_seed(2))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The base of every layer that was computed by `lora_linear`."""
    found: list[nn.Module] = []

    def recorded(x: Tensor, z: Tensor | None, term: LoraTerm, growth_O: Tensor | None) -> Tensor:
        found.append(term.base)
        return lora_linear(x, z, term, growth_O)

    monkeypatch.setattr(low_rank, "lora_linear", recorded)
    return found


@pytest.mark.parametrize("kind", METHODS)
def test_lora_linear_matches_reference_in_loss_and_gradients(
    kind: str, tiny_model: Path, calls: list[nn.Module], monkeypatch: pytest.MonkeyPatch
):
    model = attached(kind, tiny_model)
    loss, gradients = results(model)
    adapted = 2 * (2 if kind == "attention only" else 7)
    assert len(calls) == adapted
    monkeypatch.setattr(LowRankLinear, "_is_fusable", lambda self, adapter: False)
    expected, others = results(model)
    assert len(calls) == adapted  # none this time
    assert torch.allclose(loss, expected, rtol=1e-5)
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, name
        assert (gradient - others[name]).norm() <= 2e-4 * others[name].norm(), name


def test_comparison_detects_slightly_wrong_scale(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """Control: the comparison above would fail."""
    model = attached("lora", tiny_model)
    _, gradients = results(model)
    term = LowRankLinear.lora_term

    def off(layer: LowRankLinear, adapter: str) -> LoraTerm:
        return term(layer, adapter)._replace(scale=1.01 * layer.scaling[adapter])

    monkeypatch.setattr(LowRankLinear, "lora_term", off)
    _, others = results(model)
    name = next(name for name in gradients if "lora_B" in name)
    assert (gradients[name] - others[name]).norm() > 2e-3 * gradients[name].norm()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_lora_linear_applies_dropout_to_input_of_a_only(dropout: float):
    torch.manual_seed(0)
    base, x = nn.Linear(6, 5).requires_grad_(False), torch.randn(7, 6)
    term = LoraTerm(base, torch.randn(2, 6), torch.randn(5, 2), 0.5)
    z = nn.functional.dropout(x, dropout) if dropout else None
    assert torch.allclose(lora_linear(x, z, term), lora_linear_reference(x, z, term), atol=1e-5)


def test_lora_linear_in_bfloat16_gives_float32_gradients(tiny_model: Path, calls: list[nn.Module]):
    model = attached("lora", tiny_model, torch.bfloat16)
    wide, _ = results(attached("lora", tiny_model))
    loss, gradients = results(model)
    assert calls
    assert loss == pytest.approx(float(wide), rel=0.02)
    assert all(gradient.dtype is torch.float32 for gradient in gradients.values())


def test_lora_linear_matches_reference_over_conv1d(calls: list[nn.Module], monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0)
    )
    method = build(TypeAdapter(Adapter).validate_python({"method": "lora", "r": 4}), [], None)
    model = method.attach(base, 10).train()
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.05)
    loss, gradients = results(model)
    assert calls
    monkeypatch.setattr(LowRankLinear, "_is_fusable", lambda self, adapter: False)
    expected, others = results(model)
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert all(torch.allclose(gradients[name], others[name], rtol=1e-3, atol=1e-6) for name in gradients)


def test_is_fusable_is_false_for_trainable_or_hooked_base():
    assert is_fusable(nn.Linear(3, 4).requires_grad_(False))
    assert not is_fusable(nn.Linear(3, 4))
    hooked = nn.Linear(3, 4).requires_grad_(False)
    hooked.register_forward_hook(lambda layer, inputs, output: output)
    assert not is_fusable(hooked)
    assert not is_fusable(nn.Bilinear(3, 3, 4).requires_grad_(False))


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
def test_output_can_be_changed_in_place_with_the_same_gradients(shape: tuple[int, ...]):
    """As the loss does with the logits of a head, and some models with embeddings that they project."""
    torch.manual_seed(0)
    base = nn.Linear(6, 4).requires_grad_(False)
    a, b = torch.randn(2, 6, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    x = torch.randn(*shape, 6)
    lora_linear(x, None, LoraTerm(base, a, b, 0.5)).mul_(3.0).square().sum().backward()
    found = a.grad, b.grad
    a.grad = b.grad = None
    (3.0 * lora_linear_reference(x, None, LoraTerm(base, a, b, 0.5))).square().sum().backward()
    for gradient, expected in zip(found, (a.grad, b.grad), strict=True):
        torch.testing.assert_close(gradient, expected)

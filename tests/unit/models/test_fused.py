"""Fused norms and gated MLPs against the model's own: the same bits forward, the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from finetune.models.kernels import fused
from finetune.models.kernels.fused import fuse
from finetune.models.kernels.recompute import saving_inputs_only
from tests.fixtures.saved_bytes import saved_bytes

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "gelu": LlamaConfig(**SIZES, hidden_act="gelu_pytorch_tanh"),
    "mistral": MistralConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES),
}


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """Random weights, norms not all ones; every parameter is trainable."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def is_fused(module: nn.Module) -> bool:
    return "forward" in vars(module)


def loss_of(model: nn.Module) -> Tensor:
    ids = torch.randint(320, (2, 33), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("few", [False, True], ids=["at once", "a few rows at a time"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_model_matches_original_bit_for_bit_and_in_gradients(
    family: str, dtype: torch.dtype, few: bool, monkeypatch: pytest.MonkeyPatch
):
    if few:
        monkeypatch.setattr(fused, "ELEMENTS_PER_THREAD", 5 * 144 // torch.get_num_threads())
    own, ours = model_of(family, dtype), model_of(family, dtype)
    fuse(ours)
    losses = [loss_of(model) for model in (own, ours)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    tolerance = 1e-5 if dtype is torch.float32 else 0.02
    for (name, one), other in zip(own.named_parameters(), ours.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= tolerance * one.grad.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_fuse_replaces_every_norm_and_mlp(family: str):
    model = model_of(family)
    fuse(model)
    modules = [module for module in model.modules() if type(module).__name__.endswith(("RMSNorm", "MLP"))]
    assert len(modules) >= 7
    assert all(is_fused(module) for module in modules)


def test_fused_model_saves_less_and_less_still_with_recomputation():
    own, ours = model_of("llama"), model_of("llama")
    fuse(ours)

    def recomputing() -> Tensor:
        with saving_inputs_only():
            return loss_of(ours)

    in_own, in_ours = (saved_bytes(lambda model=model: loss_of(model)) for model in (own, ours))
    assert in_ours < 0.9 * in_own
    assert saved_bytes(recomputing) < 0.85 * in_ours


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_recomputation_gives_the_same_gradients(family: str):
    model = model_of(family)
    fuse(model)
    loss_of(model).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with saving_inputs_only():
        loss = loss_of(model)
    loss.backward()
    assert all(torch.equal(parameter.grad, one) for parameter, one in zip(model.parameters(), expected, strict=True))


class Doubled(nn.Module):
    """Named like a norm, with another formula."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(weight), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class DoubledRMSNorm(Doubled):
    pass


def test_fuse_keeps_modules_with_another_formula(monkeypatch: pytest.MonkeyPatch):
    model = model_of("llama")
    layer = model.model.layers[0]
    layer.input_layernorm = DoubledRMSNorm(layer.input_layernorm.weight.detach())
    unit = type(layer.mlp)
    monkeypatch.setattr(
        unit, "forward", lambda self, x: self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))
    )
    fuse(model)
    assert not is_fused(layer.input_layernorm)
    assert not is_fused(layer.mlp)
    assert is_fused(layer.post_attention_layernorm)


class WeightlessNorm(nn.Module):
    """As Falcon Mamba's norms of the time step: its weight of ones has another size and is not used."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(size), persistent=False)
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def test_norm_that_does_not_use_its_weight_is_not_fused():
    model = model_of("llama")
    model.model.norm = WeightlessNorm(7)
    fuse(model)
    assert not is_fused(model.model.norm)
    assert is_fused(model.model.layers[0].input_layernorm)
    assert model.model.norm(torch.randn(3, 5)).shape == (3, 5)

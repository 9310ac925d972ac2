"""Liger's kernels on CUDA: where they go, that nothing else of the process changes, and that results stay."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, Olmo2Config, Qwen3Config
from transformers.models.llama import modeling_llama

from finetune.adapters.lora import LoraMethod
from finetune.models.kernels import fused
from finetune.models.kernels.fused import fuse
from finetune.models.kernels.recompute import saving_inputs_only
from finetune.models.kernels.selective_checkpointing import recompute_outputs, up_projections
from finetune.recipe.sections.adapter import Lora
from tests.fixtures import fake_liger
from tests.fixtures.tiny import SIZES, random_model

FAMILIES = {
    "llama": (LlamaConfig(**SIZES), "5 of 5 norms, 2 of 2 gated MLPs"),
    "wide queries": (LlamaConfig(**SIZES | {"head_dim": 32}), "5 of 5 norms, 2 of 2 gated MLPs"),
    "qwen3": (Qwen3Config(**SIZES), "9 of 9 norms, 2 of 2 gated MLPs"),
    "gemma2": (Gemma2Config(**SIZES), "9 of 9 norms, 2 of 2 gated MLPs"),
    "gemma3": (Gemma3TextConfig(**SIZES), "13 of 13 norms, 2 of 2 gated MLPs"),
    "olmo2": (Olmo2Config(**{key: SIZES[key] for key in SIZES if key != "head_dim"}), "2 of 2 gated MLPs"),
    "exact gelu": (LlamaConfig(**SIZES, hidden_act="gelu"), "5 of 5 norms, 0 of 2 gated MLPs"),
}


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of this test get the passes that they would get on CUDA."""
    fake_liger.install(monkeypatch)
    on_cuda = fused.kernels_on("cuda")
    monkeypatch.setattr(fused, "kernels_on", lambda device: on_cuda)


def gradients(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    ids = torch.randint(320, (2, 33), generator=torch.Generator().manual_seed(1))
    with saving_inputs_only():
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("as_on_cuda")
def test_liger_model_matches_plain_model_in_loss_and_gradients(family: str):
    config, counts = FAMILIES[family]
    plain, with_liger = random_model(config), random_model(config)
    assert counts in fuse(with_liger)
    expected, found = gradients(plain), gradients(with_liger)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("family", ["llama", "wide queries", "gemma2"])
@pytest.mark.usefixtures("as_on_cuda")
def test_liger_with_selective_checkpointing_matches_plain_model(family: str):
    def lora_on(model: Any, selective: bool) -> nn.Module:
        names = up_projections(model)
        torch.manual_seed(0)
        attached = LoraMethod(Lora(method="lora", r=4)).attach(model.requires_grad_(False), 1)
        with torch.no_grad():
            for name, parameter in attached.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        if selective:
            recompute_outputs(model, names)
        return attached.train()

    plain, with_liger = (random_model(FAMILIES[family][0]) for _ in range(2))
    fuse(with_liger)
    expected, found = gradients(lora_on(plain, False)), gradients(lora_on(with_liger, True))
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.usefixtures("as_on_cuda")
def test_liger_changes_nothing_but_the_model_that_it_is_for():
    names = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP", "LlamaForCausalLM")
    before = [getattr(modeling_llama, name) for name in names]
    passes = [modeling_llama.LlamaRMSNorm.forward, modeling_llama.LlamaMLP.forward]
    fuse(random_model(FAMILIES["llama"][0]))
    assert [getattr(modeling_llama, name) for name in names] == before
    assert [modeling_llama.LlamaRMSNorm.forward, modeling_llama.LlamaMLP.forward] == passes
    later = random_model(FAMILIES["llama"][0])
    assert not any("forward" in vars(module) for module in later.modules())


def test_model_on_cuda_without_liger_keeps_its_own_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    on_cuda = fused.kernels_on("cuda")
    assert on_cuda is None
    monkeypatch.setattr(fused, "kernels_on", lambda device: on_cuda)
    model = random_model(FAMILIES["llama"][0])
    assert "the model's own" in fuse(model)
    assert not any("forward" in vars(module) for module in model.modules())

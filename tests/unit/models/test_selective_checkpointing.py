"""Selective checkpointing: recomputed outputs have the same bits with every method, and are not saved."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, Phi3Config, PreTrainedModel

from finetune.models.kernels.fused import fuse
from finetune.models.kernels.recompute import saving_inputs_only
from finetune.models.kernels.selective_checkpointing import recompute_outputs, up_projections
from finetune.train.loss import summed_cross_entropy
from tests.fixtures.saved_bytes import saved_bytes
from tests.fixtures.tiny import tiny_llama
from tests.unit.models.methods import KINDS, attached, base_of, outcome, rows


def model_of(kind: str, folder: Path, *, selective: bool, fused: bool = True, **settings: Any) -> nn.Module:
    base = base_of(kind, folder)
    if fused:
        fuse(base)
    names = up_projections(base)
    model = attached(kind, base, folder, **settings)
    if selective:
        recompute_outputs(base, names)
    return model


def assert_same(kind: str, folder: Path, **settings: Any) -> None:
    own, ours = (model_of(kind, folder, selective=selective, **settings) for selective in (False, True))
    batch = rows(kind, [40, 31, 9])
    torch.manual_seed(1)
    loss, gradients = outcome(own, batch)
    torch.manual_seed(1)
    found_loss, found = outcome(ours, batch)
    assert found_loss == loss
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_selective_checkpointing_matches_plain_model_bit_for_bit(kind: str, tiny_model: Path):
    assert_same(kind, tiny_model)


def test_selective_checkpointing_matches_without_fused_kernels(tiny_model: Path):
    assert_same("lora", tiny_model, fused=False)


@pytest.mark.parametrize(
    ("kind", "settings"), [("lora", {"dropout": 0.3}), ("dora", {"dropout": 0.3}), ("loha", {"module_dropout": 0.5})]
)
def test_selective_checkpointing_matches_with_dropout(kind: str, settings: dict[str, Any], tiny_model: Path):
    assert_same(kind, tiny_model, **settings)
    one, other = (outcome(model_of(kind, tiny_model, selective=True, **settings), rows(kind, [40]))[0] for _ in "ab")
    assert one == other  # the same seed
    torch.manual_seed(5)
    model = model_of(kind, tiny_model, selective=True, **settings)
    torch.manual_seed(5)
    assert outcome(model, rows(kind, [40]))[0] != one  # the control: numbers are drawn


def test_selective_checkpointing_leaves_the_random_state_unchanged(tiny_model: Path):
    drawn = []
    for selective in (False, True):
        model = model_of("lora", tiny_model, selective=selective, dropout=0.3)
        outcome(model, rows("lora", [40]))
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_selective_checkpointing_matches_under_autocast(tiny_model: Path):
    found = []
    for selective in (False, True):
        model = model_of("lora", tiny_model, selective=selective)
        with torch.autocast("cpu", torch.bfloat16):
            loss = summed_cross_entropy(model, rows("lora", [40, 12]))
        loss.backward()  # outside of it
        found.append([weight.grad for weight in model.parameters() if weight.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


FAMILIES = {
    "gpt2": (GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=2), ["attn.c_attn", "mlp.c_fc"]),
    "phi3": (
        Phi3Config(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            pad_token_id=0,
        ),
        ["self_attn.qkv_proj", "mlp.gate_up_proj"],
    ),
}


def own_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(FAMILIES[family][0]).eval()  # GPT-2 drops out
    return model


def loss_of(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(1))
    with saving_inputs_only():
        loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


@pytest.mark.parametrize("family", FAMILIES)
def test_selective_checkpointing_covers_fused_projections_of_other_families(family: str):
    own, ours = own_model(family), own_model(family)
    names = up_projections(ours)
    assert [name.split(".", 3)[-1] for name in names] == 2 * FAMILIES[family][1]
    recompute_outputs(ours, names)
    wide = 66 * 4 * 2 * 128  # bytes of two layers' gate and up, or their counterparts in GPT-2
    assert saved_bytes(lambda: loss_of(own)) - saved_bytes(lambda: loss_of(ours)) >= wide
    for model in (own, ours):
        loss_of(model).backward()
    for one, other in zip(own.parameters(), ours.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_up_projections_are_only_layers_in_blocks():
    assert up_projections(tiny_llama()) == [
        f"model.layers.{block}.mlp.{name}_proj" for block in (0, 1) for name in ("gate", "up")
    ]


def test_selective_checkpointing_layer_copy_uses_its_own_weights():
    base = tiny_llama()
    recompute_outputs(base, up_projections(base))
    layer = base.model.layers[0].mlp.up_proj
    copied = deepcopy(layer)
    with torch.no_grad():
        copied.weight.zero_()
    x = torch.randn(3, layer.in_features)
    assert not copied(x).any()
    assert layer(x).all()

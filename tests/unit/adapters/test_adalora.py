"""AdaLoRA on a model: layer, penalty, budget, saving, resume."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from finetune.adapters.adalora import AdaLoraLinear, AdaLoraMethod
from finetune.data.collate import Batch, padded
from finetune.data.encode import Example
from finetune.errors import RefusedError, UnsupportedError
from finetune.evaluation.loss import compute_validation_loss
from finetune.models.linear_layers import dequantize_model
from finetune.recipe.sections.adapter import AdaLora
from finetune.recipe.sections.modules import ModuleRule
from finetune.train.optimizers import parameter_groups
from finetune.train.state import TrainState
from finetune.train.step import train_step
from tests.fixtures.merge_helpers import merged
from tests.fixtures.tiny import tiny_llama
from tests.unit.quantizers.loading import PACKED, load, logits, section

BASES = {
    "none": section(kind="none"),
    **{kind: PACKED[kind] for kind in ("nf4", "affine-4", "hqq-2", "icq-3")},
    "int8": section(kind="int8"),
}
STEPS = 10
RATE = 20.0


def adalora(rules: Sequence[ModuleRule] = (), **settings: Any) -> AdaLoraMethod:
    return AdaLoraMethod(AdaLora(**{"method": "adalora", "r": 4, "target_r": 2, "alpha": 8, **settings}), rules)


def batches(step: int, count: int = 1) -> list[Batch]:
    """Four rows of a step, in as many batches."""
    draw = torch.Generator().manual_seed(step)
    rows = []
    for index in range(4):
        ids = torch.randint(0, 250, (8 + 2 * index,), generator=draw).tolist()
        rows.append(Example(ids, [position > 3 for position in range(len(ids))]))
    size = len(rows) // count
    return [padded(rows[start : start + size], 0) for start in range(0, len(rows), size)]


def state_of(method: AdaLoraMethod, base: nn.Module, total_steps: int = STEPS) -> TrainState:
    torch.manual_seed(5)
    model = method.attach(base, total_steps).train()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0, lambda name: 1.0), lr=0.1)
    return TrainState(Accelerator(cpu=True), model, method, optimizer, torch.float32)


def take_steps(state: TrainState, upto: int, micro_batches: int = 1) -> TrainState:
    while state.step < upto:
        train_step(state, batches(state.step, micro_batches), RATE, None)
    return state


def layers(model: nn.Module) -> list[AdaLoraLinear]:
    return [layer for layer in model.modules() if isinstance(layer, AdaLoraLinear)]


def is_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


# The layer


@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
def test_untrained_adalora_keeps_logits_and_is_all_that_trains(tiny_model: Path, kind: str):
    model = load(tiny_model, BASES[kind])
    before = logits(model)
    attached = adalora().attach(model, STEPS)
    assert torch.equal(logits(attached), before)
    trainable = {name: p for name, p in attached.named_parameters() if p.requires_grad}
    assert all(p.dtype is torch.float32 for p in trainable.values())
    assert {name.rpartition("lora_")[2][0] for name in trainable} == {"A", "B", "E"}
    sizes = [layer.in_features + layer.out_features + 1 for layer in layers(attached)]
    assert len(sizes) == 14
    assert sum(p.numel() for p in trainable.values()) == 4 * sum(sizes)


def test_adalora_layer_matches_formula():
    layer = layers(take_steps(state_of(adalora(), tiny_llama()), 2).model)[0].double()
    a_RI, e_R1, b_OR = layer.triplets("default")
    x = torch.randn(3, layer.in_features, dtype=torch.float64)
    update_OI = 8 / 4 * b_OR @ torch.diag(e_R1[:, 0]) @ a_RI
    assert is_close(layer(x), x @ (layer.get_base_layer().weight + update_OI).T, 1e-12)
    assert is_close(layer.get_delta_weight("default"), update_OI, 1e-12)


def test_adalora_vectors_are_initially_normal_with_std_of_authors():
    for layer in layers(adalora(r=12).attach(tiny_llama(), STEPS)):
        for vectors in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            assert float(vectors.detach().std()) == pytest.approx(0.02, rel=0.2)


def test_adalora_singular_values_have_weight_decay():
    model = adalora().attach(tiny_llama(), STEPS)
    (decaying,) = parameter_groups(model, 0.1, lambda name: 1.0)
    assert len(decaying["params"]) == 3 * 14


# The penalty


def test_penalty_is_mean_distance_from_orthogonal():
    method = adalora(orthogonal_weight=0.3)
    model = method.attach(tiny_llama(), STEPS)
    norms = []
    for layer in layers(model):
        a_RI, _, b_OR = layer.triplets("default")
        for product in (a_RI @ a_RI.T, b_OR.T @ b_OR):
            norms.append(float(((product.detach() - torch.eye(4)) ** 2).sum() ** 0.5))
    assert method.penalty(model).item() == pytest.approx(0.3 * sum(norms) / len(norms), rel=1e-5)
    for layer in layers(model):
        with torch.no_grad():
            nn.init.orthogonal_(layer.lora_A["default"].weight)
            nn.init.orthogonal_(layer.lora_B["default"].weight)
    assert method.penalty(model).item() < 1e-6


def test_penalty_has_gradient_without_that_of_the_loss():
    """While E is zero, the loss has no gradient for A and B; only the penalty has."""
    moved = {}
    for weight in (0.0, 0.1):
        method = adalora(orthogonal_weight=weight)
        state = state_of(method, tiny_llama())
        before = copy.deepcopy([layer.lora_A["default"].weight for layer in layers(state.model)])
        rows_A = [layer.lora_A["default"].weight for layer in layers(state.model)]
        gradients = torch.autograd.grad(method.penalty(state.model), rows_A)
        take_steps(state, 1, micro_batches=2)
        moved[weight] = [
            bool((layer.lora_A["default"].weight != old).any())
            for layer, old in zip(layers(state.model), before, strict=True)
        ]
        for layer, old, gradient in zip(layers(state.model), before, gradients, strict=True):
            assert torch.allclose(layer.lora_A["default"].weight, old - RATE * gradient, atol=1e-6)
    assert not any(moved[0.0])
    assert all(moved[0.1])


def test_penalty_is_in_neither_reported_nor_validation_loss():
    found = {}
    for weight in (0.0, 100.0):
        method = adalora(orthogonal_weight=weight)
        state = state_of(method, tiny_llama())
        rows = [Example(list(range(1, 20)), [position > 3 for position in range(19)])]
        settings = {"compute_dtype": torch.float32, "batch_size": 1, "make_batch": partial(padded, padding=0)}
        validation_loss = compute_validation_loss(state.model, rows, accelerator=state.accelerator, **settings).loss
        reported, _ = train_step(state, batches(0), 0.0, None)
        found[weight] = (validation_loss, reported, float(method.penalty(state.model)))
    assert found[0.0][:2] == found[100.0][:2]
    assert found[100.0][2] > 50


def test_adalora_micro_batches_match_one_batch():
    batched = take_steps(state_of(adalora(), tiny_llama()), STEPS)
    parts = take_steps(state_of(adalora(), tiny_llama()), STEPS, micro_batches=4)
    assert batched.method.ranks(batched.model) == parts.method.ranks(parts.model)
    for one, other in zip(layers(batched.model), layers(parts.model), strict=True):
        for factor, same in zip(one.triplets("default"), other.triplets("default"), strict=True):
            assert torch.allclose(factor, same, atol=1e-4)
    assert len(set(batched.method.ranks(batched.model).values())) > 2  # ranks did move


# The budget


def test_budget_follows_from_steps_of_run():
    method = adalora(initial_ratio=0.1, final_ratio=0.4)
    method.attach(tiny_llama(), 1000)
    budget = method.allocator.budget
    assert (budget.first, budget.last) == (14 * 4, 14 * 2)
    assert (budget.initial_steps, budget.falling_steps, budget.every) == (100, 500, 5)
    method = adalora(initial_steps=3, final_steps=2, allocate_every=4)
    method.attach(tiny_llama(), 8)
    budget = method.allocator.budget
    assert (budget.initial_steps, budget.falling_steps, budget.every) == (3, 3, 4)


@pytest.mark.parametrize("total_steps", [2, 3, 10])
def test_trained_ranks_sum_to_budget(total_steps: int):
    state = take_steps(state_of(adalora(), tiny_llama(), total_steps), total_steps)
    assert sum(state.method.ranks(state.model).values()) == 14 * 2
    assert sum(int((layer.lora_E["default"] != 0).sum()) for layer in layers(state.model)) == 14 * 2


@pytest.mark.parametrize(
    ("settings", "total_steps"),
    [({"initial_steps": 4, "final_steps": 6}, 10), ({"initial_steps": 12}, 10), ({"final_steps": 9}, 10), ({}, 1)],
)
def test_attach_refuses_too_few_steps(settings: dict[str, int], total_steps: int):
    with pytest.raises(UnsupportedError, match=f"of {total_steps} steps .* too few are left"):
        adalora(**settings).attach(tiny_llama(), total_steps)


def test_module_rules_set_initial_rank_or_skip_layers():
    rules = [
        ModuleRule(match="*.down_proj", adapter={"r": 6}),
        ModuleRule(match="*.layers.0.self_attn.*", adapter={"skip": True}),
    ]
    method = adalora(rules)
    state = take_steps(state_of(method, tiny_llama()), STEPS)
    ranks = method.ranks(state.model)
    assert len(ranks) == 10
    assert "model.layers.0.self_attn.q_proj" not in ranks
    assert method.allocator.budget.first == 8 * 4 + 2 * 6
    assert sum(ranks.values()) == 10 * 2
    with pytest.raises(UnsupportedError, match="28 are to remain"):
        adalora([ModuleRule(match="*", adapter={"r": 2})]).attach(tiny_llama(), STEPS)


# Saving


@pytest.mark.parametrize("kind", BASES)
def test_saved_adalora_gives_same_logits_in_stock_peft_and_merged(tiny_model: Path, tmp_path: Path, kind: str):
    rules = [ModuleRule(match="*.v_proj", adapter={"alpha": 3})]
    method = adalora(rules)
    live = take_steps(state_of(method, load(tiny_model, BASES[kind])), STEPS).model
    expected = logits(live)
    method.save(live, tmp_path)
    assert torch.equal(logits(adalora(rules).load(load(tiny_model, BASES[kind]), tmp_path)), expected)
    assert not is_close(logits(load(tiny_model, BASES[kind])), expected, 1e-2)  # the update matters

    def dequantized() -> nn.Module:
        return dequantize_model(load(tiny_model, BASES[kind]), torch.float32)

    if kind == "int8":  # int8 also rounds activations, which a merged weight does not
        expected = logits(adalora(rules).load(dequantized(), tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = method.ranks(live).values()
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", max(ranks), max(ranks))
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    stock = load_file(tmp_path / "adapter_model.safetensors")
    for name, layer in live.named_modules():
        if isinstance(layer, AdaLoraLinear):
            product = stock[f"{name}.lora_B.weight"] @ stock[f"{name}.lora_A.weight"]
            assert is_close(product, layer.get_delta_weight("default"))
    assert is_close(logits(peft.PeftModel.from_pretrained(dequantized(), tmp_path).eval()), expected, 1e-5)
    assert is_close(logits(merged(adalora(rules), dequantized(), tmp_path)), expected, 1e-5)


def test_adalora_works_over_conv1d(tmp_path: Path):
    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=2)

    def base() -> nn.Module:
        torch.manual_seed(0)
        return GPT2LMHeadModel(config)

    method = adalora()
    live = take_steps(state_of(method, base()), STEPS).model
    method.save(live, tmp_path)
    assert is_close(logits(peft.PeftModel.from_pretrained(base(), tmp_path).eval()), logits(live), 1e-5)
    assert is_close(logits(merged(adalora(), base(), tmp_path)), logits(live), 1e-5)


# Resume


@pytest.mark.parametrize("stop", [4, 8])
def test_restored_state_resumes_bitwise(stop: int):
    uninterrupted = take_steps(state_of(adalora(), tiny_llama()), STEPS)
    first = take_steps(state_of(adalora(), tiny_llama()), stop)
    kept = {name: tensor.clone() for name, tensor in first.method.state(first.model).items()}
    second = state_of(adalora(), tiny_llama())
    second.method.restore(second.model, kept)
    second.step = stop
    take_steps(second, STEPS)
    found, expected = second.method.state(second.model), uninterrupted.method.state(uninterrupted.model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("missing", ["sensitivity.", "uncertainty.", "kept.", "budget", "base_model."])
def test_restore_refuses_incomplete_state(missing: str):
    state = state_of(adalora(), tiny_llama())
    kept = state.method.state(state.model)
    names = [name for name in kept if name.startswith(missing)]
    assert names
    with pytest.raises(RefusedError, match="the checkpoint lacks"):
        state.method.restore(state.model, {name: tensor for name, tensor in kept.items() if name != names[-1]})


def test_restore_refuses_state_of_another_budget():
    state = state_of(adalora(), tiny_llama(), total_steps=20)
    longer = state_of(adalora(), tiny_llama(), total_steps=40)
    with pytest.raises(RefusedError, match="another budget"):
        longer.method.restore(longer.model, state.method.state(state.model))

"""Optimizers: each one takes steps and has the properties of its library's class."""

from __future__ import annotations

import logging

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from finetune.recipe.sections.optimizer import Optimizer
from finetune.train.optimizers import make_optimizer, parameter_groups, state_bytes

NAMES = ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "sgd", "adafactor"]


def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(128, 64), torch.randn(32, 128), torch.randn(32, 64)


def train(name: str, steps: int, **settings: object) -> tuple[float, float, nn.Module]:
    model, inputs, wanted = problem()
    section = TypeAdapter(Optimizer).validate_python({"name": name, "learning_rate": 1e-2, **settings})
    optimizer = make_optimizer(section, model)
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(inputs), wanted)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses[0], losses[-1], model


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_lowers_loss(name: str):
    first, last, _ = train(name, steps=20)
    assert last < 0.9 * first


def test_paged_adamw_32bit_matches_adamw():
    plain, paged = train("adamw", 5)[2], train("paged_adamw_32bit", 5)[2]
    assert torch.allclose(plain.weight, paged.weight, atol=1e-6)


def test_adamw_8bit_has_uint8_moments():
    model, inputs, _ = problem()
    section = TypeAdapter(Optimizer).validate_python({"name": "adamw_8bit"})
    optimizer = make_optimizer(section, model)
    model(inputs).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["state1"].dtype is torch.uint8


@pytest.mark.parametrize("name", NAMES)
def test_state_bytes_match_actual_state(name: str):
    model, inputs, _ = problem()
    section = TypeAdapter(Optimizer).validate_python({"name": name})
    optimizer = make_optimizer(section, model)
    model(inputs).sum().backward()
    optimizer.step()
    kept = [
        tensor
        for state in optimizer.state.values()
        for each, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and not each.startswith("qmap")  # shared by all parameters
    ]
    numbers = sum(tensor.nbytes for tensor in kept if tensor.dim())
    assert state_bytes(section, model.parameters()) == numbers > 0


def test_paged_optimizer_without_gpu_warns_once(caplog: pytest.LogCaptureFixture):
    if torch.cuda.is_available():
        pytest.skip("this machine can page")
    with caplog.at_level(logging.WARNING, logger="finetune"):
        train("paged_adamw_8bit", steps=2)
    assert [record.message for record in caplog.records if "page" in record.message] == [
        "paged_adamw_8bit: only a GPU can page optimizer state; it stays in ordinary memory"
    ]


def test_weight_decay_applies_to_matrices_only():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model[0].weight.requires_grad_(True)
    groups = {group["weight_decay"]: group["params"] for group in parameter_groups(model, 0.1, lambda name: 1.0)}
    assert [p.ndim for p in groups[0.1]] == [2]
    assert [p.ndim for p in groups[0.0]] == [1, 1, 1]


def test_parameter_groups_exclude_frozen_weights():
    model = nn.Linear(4, 4)
    model.weight.requires_grad_(False)
    assert [group["weight_decay"] for group in parameter_groups(model, 0.1, lambda name: 1.0)] == [0.0]


def test_parameter_groups_follow_lr_multiplier():
    model = nn.Linear(4, 4)
    groups = parameter_groups(model, 0.0, lambda name: 16.0 if name == "weight" else 1.0)
    assert {group["lr_multiplier"]: len(group["params"]) for group in groups} == {16.0: 1, 1.0: 1}

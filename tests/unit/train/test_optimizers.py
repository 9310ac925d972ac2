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


# --- Adafactor, against algorithm 4 of arXiv 1804.04235 written out in float64


def adafactor_reference(weight: torch.Tensor, gradients: list[torch.Tensor], lr: float, relative: bool) -> torch.Tensor:
    x = weight.double().clone()
    row = column = full = torch.zeros((), dtype=torch.float64)
    for t, gradient in enumerate(gradients, 1):
        beta, g = 1 - t**-0.8, gradient.double()
        square = g**2 + 1e-30
        if x.ndim >= 2:
            row = beta * row + (1 - beta) * square.sum(1)
            column = beta * column + (1 - beta) * square.sum(0)
            second = torch.outer(row, column) / row.sum()
        else:
            full = beta * full + (1 - beta) * square
            second = full
        update = g / second.sqrt()
        update = update / max(1, (update**2).mean().sqrt() / 1.0)
        alpha = min(lr, t**-0.5) * max(1e-3, (x**2).mean().sqrt()) if relative else lr
        x = x - alpha * update
    return x


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("shape", [(12, 7), (9,)], ids=["matrix", "vector"])
@pytest.mark.parametrize("start", [0.0, 1.0], ids=["zeros", "values"])
def test_adafactor_matches_the_paper(shape: tuple[int, ...], start: float, relative: bool):
    torch.manual_seed(0)
    parameter = nn.Parameter(start * torch.randn(shape))
    weight, gradients = parameter.detach().clone(), [torch.randn(shape) * 10.0**place for place in range(-3, 2)]
    section = TypeAdapter(Optimizer).validate_python(
        {"name": "adafactor", "learning_rate": 3e-3, "relative_steps": relative}
    )
    module = nn.Module()
    module.weight = parameter
    optimizer = make_optimizer(section, module)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    expected = adafactor_reference(weight, gradients, 3e-3, relative)
    assert torch.allclose(parameter.detach().double(), expected, rtol=1e-4, atol=1e-7)


def test_adafactor_with_relative_steps_matches_pytorch():
    """PyTorch's class has relative steps alone."""
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.randn(12, 7, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    section = TypeAdapter(Optimizer).validate_python(
        {"name": "adafactor", "learning_rate": 0.7, "relative_steps": True}
    )
    module = nn.Module()
    module.weight = ours
    optimizers = [make_optimizer(section, module), torch.optim.Adafactor([theirs], lr=0.7)]
    for _ in range(4):
        gradient = torch.randn(12, 7)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert {key: value.shape for key, value in optimizers[0].state[ours].items()} == {
        key: value.shape for key, value in optimizers[1].state[theirs].items()
    }


def test_adafactor_moves_a_weight_of_zeros_by_the_learning_rate():
    """LoRA's B; the control is PyTorch's class, which moves it by a thousandth."""
    moved = []
    for make in (
        lambda parameter: make_optimizer(
            TypeAdapter(Optimizer).validate_python({"name": "adafactor", "learning_rate": 2e-4}), parameter
        ),
        lambda parameter: torch.optim.Adafactor(parameter.parameters(), lr=2e-4),
    ):
        module = nn.Module()
        module.b = nn.Parameter(torch.zeros(20, 4))
        optimizer = make(module)
        module.b.grad = torch.ones(20, 4)
        optimizer.step()
        moved.append(float(module.b.abs().max()))
    assert moved == pytest.approx([2e-4, 2e-7], rel=1e-3)


# --- weight decay


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rate", [1e-2, 1e-3])
def test_weight_decay_is_decoupled(name: str, rate: float):
    """Loshchilov and Hutter: with decay, w becomes w (1 - rate decay) and the update is that without decay."""
    settings = {"learning_rate": rate, "relative_steps": False} if name == "adafactor" else {"learning_rate": rate}
    ends = []
    for decay in (0.0, 0.5):
        model, inputs, _ = problem()
        start = model.weight.detach().clone()
        section = TypeAdapter(Optimizer).validate_python({"name": name, "weight_decay": decay, **settings})
        optimizer = make_optimizer(section, model)
        model(inputs).square().mean().backward()
        optimizer.step()
        ends.append(model.weight.detach())
    assert torch.allclose(ends[1] - ends[0], -rate * 0.5 * start, atol=2e-7)


def test_sgd_matches_sgdw_over_several_steps():
    """Algorithm 1 of arXiv 1711.05101 in float64; the control is PyTorch's coupled decay."""
    torch.manual_seed(0)
    weight, gradients = torch.randn(6, 5), torch.randn(5, 6, 5)
    module = nn.Module()
    module.weight = nn.Parameter(weight.clone())
    coupled = nn.Parameter(weight.clone())
    section = TypeAdapter(Optimizer).validate_python({"name": "sgd", "learning_rate": 0.1, "weight_decay": 0.2})
    optimizers = [make_optimizer(section, module), torch.optim.SGD([coupled], 0.1, momentum=0.9, weight_decay=0.2)]
    x, momentum = weight.double(), torch.zeros(6, 5, dtype=torch.float64)
    for gradient in gradients:
        momentum = 0.9 * momentum + gradient.double()
        x = x - 0.1 * momentum - 0.1 * 0.2 * x
        for parameter, optimizer in zip((module.weight, coupled), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.allclose(module.weight.detach().double(), x, atol=1e-6)
    assert not torch.allclose(coupled.detach().double(), x, atol=1e-3)

"""Stochastic rounding of bfloat16 weights, and the warning about weights that do not move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from finetune.recipe.sections.optimizer import Optimizer
from finetune.run.events import StepMetrics
from finetune.train.optimizers import make_optimizer, state_bytes
from finetune.train.rounding import stochastically_rounded
from finetune.train.weight_changes import WeightChanges

NAMES = ["adamw", "adamw_8bit", "paged_adamw_32bit", "lion_8bit", "sgd", "adafactor"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, 1e-30, 0.02 + 1e-5])
def test_rounded_value_is_one_of_both_neighbours_and_right_on_average(value: float):
    wide = torch.full((200_000,), value)
    found = stochastically_rounded(wide, generator()).double()
    exact = float(wide[0].double())
    assert len(found.unique()) == 2
    low, high = found.unique().tolist()
    assert low < exact < high
    assert low == float(torch.tensor(low).bfloat16())
    assert high == float(torch.tensor(high).bfloat16())
    assert not low < float(wide[0].bfloat16()) < high
    assert float(found.mean()) == pytest.approx(exact, abs=4 * (high - low) / 2 / 200_000**0.5)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, float("inf"), float("-inf")])
def test_value_that_bfloat16_holds_stays(value: float):
    assert torch.equal(
        stochastically_rounded(torch.full((1000,), value), generator()).float(), torch.full((1000,), value)
    )


def test_nan_stays_nan():
    assert stochastically_rounded(torch.full((1000,), float("nan")), generator()).isnan().all()


def trained(name: str, dtype: torch.dtype, rounding: str, steps: int, rate: float = 1e-5) -> Tensor:
    """A weight of 0.02 after steps with gradients of one sign, so that it moves by the rate in each."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.full((64, 128), 0.02, dtype=dtype))
    module.bias = nn.Parameter(torch.zeros(3))  # float32 weights beside it are updated as they are
    section = TypeAdapter(Optimizer).validate_python({"name": name, "learning_rate": rate, "rounding": rounding})
    optimizer: Any = make_optimizer(section, module, seed=3)
    torch.manual_seed(1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["steps"] = step
        module.weight.grad = (1 + 0.1 * torch.rand(64, 128)).to(dtype)
        module.bias.grad = torch.ones(3)
        optimizer.step()
    assert module.weight.dtype is dtype
    assert float(module.bias.abs().min()) > 0
    return module.weight.detach()


@pytest.mark.parametrize("name", NAMES)
def test_stochastic_rounding_moves_weights_as_float32_does(name: str):
    rate = 1e-5
    wide = trained(name, torch.float32, "nearest", 20, rate).double()
    found = trained(name, torch.bfloat16, "stochastic", 20, rate).double()
    start = float(torch.tensor(0.02).bfloat16())
    moved, expected = float(found.mean()) - start, float(wide.mean()) - float(torch.tensor(0.02))
    assert moved == pytest.approx(expected, rel=0.1)
    if name != "sgd":  # whose steps have the size of the gradient
        # The control: rounded to nearest, no weight moves.
        assert (trained(name, torch.bfloat16, "nearest", 20, rate).double() == start).all()


def test_draws_depend_on_the_step_and_the_seed_alone():
    assert torch.equal(
        trained("adamw", torch.bfloat16, "stochastic", 3), trained("adamw", torch.bfloat16, "stochastic", 3)
    )
    torch.manual_seed(77)
    once = trained("adamw", torch.bfloat16, "stochastic", 1)
    torch.rand(5)
    assert torch.equal(once, trained("adamw", torch.bfloat16, "stochastic", 1))


@pytest.mark.parametrize("name", NAMES)
def test_state_bytes_count_moments_in_float32(name: str):
    module = nn.Linear(128, 64, dtype=torch.bfloat16)
    section = TypeAdapter(Optimizer).validate_python({"name": name, "rounding": "stochastic"})
    optimizer = make_optimizer(section, module)
    module(torch.randn(2, 128).bfloat16()).sum().backward()
    optimizer.step()
    kept = [
        tensor
        for state in optimizer.state.values()
        for key, tensor in state.items()
        if isinstance(tensor, Tensor) and not key.startswith("qmap")
    ]
    assert state_bytes(section, module.parameters()) == sum(tensor.nbytes for tensor in kept if tensor.dim()) > 0


# --- the warning


def step(number: int, rate: float = 1e-5, total: int = 100) -> StepMetrics:
    return StepMetrics(
        step=number,
        total_steps=total,
        epoch=0.0,
        loss=1.0,
        gradient_norm=1.0,
        learning_rate=rate,
        tokens=1,
        tokens_per_second=1.0,
        peak_memory_bytes=None,
        seconds=1.0,
    )


def warnings(share: float, dtype: torch.dtype, steps: list[StepMetrics]) -> list[str]:
    """The warnings while this share of the weights changes in each step."""
    model = nn.Linear(100, 50, dtype=dtype)
    changes = WeightChanges(model)
    found = []
    for each in steps:
        with torch.no_grad():
            model.weight[:, : int(100 * share)] += 1
        found += [warning.what for warning in [changes.follow(each, 1e-5)] if warning]
    return found


def test_warning_names_the_share_of_weights_that_changed():
    found = warnings(0.02, torch.bfloat16, [step(number) for number in range(1, 30)])
    assert len(found) == 1
    assert "2.0%" in found[0]
    assert "10 steps" in found[0]


def test_weight_changes_of_most_weights_or_of_float32_weights_raise_no_warning():
    steps = [step(number) for number in range(1, 30)]
    assert not warnings(0.9, torch.bfloat16, steps)
    assert not warnings(0.02, torch.float32, steps)


def test_warm_up_is_not_counted_and_a_short_run_warns_at_its_end():
    slow = [step(number, rate=1e-7) for number in range(1, 15)]
    assert not warnings(0.02, torch.bfloat16, slow)
    short = [step(number, total=4) for number in range(1, 5)]
    assert "in 3 steps" in warnings(0.02, torch.bfloat16, short)[0]

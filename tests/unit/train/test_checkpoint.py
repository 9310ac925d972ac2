"""Training state on disk: bitwise resume, refusal of incomplete state."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.adapters.base import AdapterMethod
from finetune.data.batch_plan import BatchPlan
from finetune.data.collate import BatchOrder
from finetune.data.encode import Example
from finetune.errors import DivergedError, EnvironmentFault, RefusedError
from finetune.recipe.sections.adapter import Adapter
from finetune.recipe.sections.optimizer import Optimizer, OptimizerSection
from finetune.recipe.sections.training import Training
from finetune.resolve import build
from finetune.train import checkpoint as module
from finetune.train.checkpoint import COUNTERS, OPTIMIZER, STATE, TRAINED, read_state, write_state
from finetune.train.loop import fit
from finetune.train.optimizers import make_optimizer
from finetune.train.state import TrainState
from tests.fixtures.tiny import tiny_llama

OPTIMIZERS = ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "sgd", "adafactor"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "r": 64, "dropout": 0.1},  # matrices large enough for 8-bit moments
    "full": {"method": "full"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "dora": {"method": "lora", "r": 4, "dora": True},
    "pissa": {"method": "lora", "r": 4, "initialization": "pissa"},
    "vera": {"method": "vera", "r": 8},
    "ia3": {"method": "ia3"},
    "loha": {"method": "loha", "r": 4, "module_dropout": 0.3},
    "lokr": {"method": "lokr", "r": 4},
    "oft": {"method": "oft", "module_dropout": 0.3},
    "bitfit": {"method": "full", "train": ["*norm.weight"]},
}
"""Methods that are tested with one optimizer."""
ORDER = BatchOrder(units=7, units_per_step=3, seed=5, total_units=14)  # two epochs, one step across their boundary
TRAINING = Training(micro_batch_size=1, gradient_accumulation_steps=3, seed=5)


def rows() -> list[Example]:
    draw = torch.Generator().manual_seed(0)
    lengths = [4 + 2 * index for index in range(ORDER.units)]
    return [Example(torch.randint(0, 250, (n,), generator=draw).tolist(), [True] * n) for n in lengths]


ROWS = rows()


class Setup(NamedTuple):
    """A method and an optimizer, and the fresh states made of them."""

    method: str
    optimizer: str

    @property
    def section(self) -> OptimizerSection:
        values = {"name": self.optimizer, "learning_rate": 1e-2, "weight_decay": 0.1, "warmup_steps": 1}
        return TypeAdapter(Optimizer).validate_python(values)

    def fresh(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> TrainState:
        method: AdapterMethod = build(TypeAdapter(Adapter).validate_python({**METHODS, **OTHERS}[self.method]))
        torch.manual_seed(seed)
        model = method.attach(tiny_llama(), ORDER.total_steps)
        method.initialize(model, lambda name: model.get_submodule(name).weight)
        return TrainState(Accelerator(cpu=True), model, method, make_optimizer(self.section, model), dtype)

    def steps(self, state: TrainState) -> Iterator[tuple[float, ...]]:
        layout = BatchPlan.of(TRAINING, np.array([len(row.ids) for row in ROWS]), 64, 0)
        for metrics in fit(state, ROWS, ORDER, self.section, TRAINING, layout):
            yield metrics.step, metrics.loss, metrics.gradient_norm, metrics.learning_rate, metrics.tokens


def contents(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint without elapsed seconds."""
    written = json.loads((folder / STATE).read_text())
    written["counters"].pop("seconds")
    return {"trained": load_file(folder / TRAINED), "optimizer": load_file(folder / OPTIMIZER), "state": written}


def are_equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    parts: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = [(one[p], other[p]) for p in ("trained", "optimizer")]
    return one["state"] == other["state"] and all(
        a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
        for a, b in parts
    )


def saved(state: TrainState, folder: Path) -> Path:
    folder.mkdir(parents=True)
    write_state(state, folder)
    return folder


def uninterrupted(setup: Setup, folder: Path) -> list[tuple[float, ...]]:
    """Train to the end with a checkpoint after every step, `folder/1` and so on."""
    state = setup.fresh()
    steps = []
    for step in setup.steps(state):
        steps.append(step)
        saved(state, folder / str(state.step))
    return steps


@pytest.mark.parametrize(
    ("optimizer", "method"),
    [
        *((optimizer, method) for optimizer in OPTIMIZERS for method in METHODS),
        *(("adamw", method) for method in OTHERS),
    ],
)
def test_resume_from_any_step_gives_same_end_bitwise(optimizer: str, method: str, tmp_path: Path):
    setup = Setup(method, optimizer)
    steps = uninterrupted(setup, tmp_path)
    assert [step[0] for step in steps] == [1, 2, 3, 4, 5]
    for done in range(1, 5):
        state = setup.fresh(seed=99)  # the checkpoint replaces all of it
        read_state(state, tmp_path / str(done))
        assert list(setup.steps(state)) == steps[done:]
        resumed = saved(state, tmp_path / f"from-{done}")
        assert are_equal(contents(resumed), contents(tmp_path / "5"))
    if "8bit" in optimizer:
        assert {tensor.dtype for tensor in contents(tmp_path / "5")["optimizer"].values()} >= {torch.uint8}


def test_write_after_read_gives_same_bytes(tmp_path: Path):
    setup = Setup("full", "adamw_8bit")
    uninterrupted(setup, tmp_path)
    state = setup.fresh(seed=99)
    read_state(state, tmp_path / "3")
    again = saved(state, tmp_path / "again")
    for name in (TRAINED, OPTIMIZER, STATE):
        assert (again / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


# Controls: without any part of the state the resumed run differs.


def forget_moments(state: TrainState) -> None:
    state.optimizer.state.clear()


def forget_step(state: TrainState) -> None:
    state.step -= 1


def forget_tokens(state: TrainState) -> None:
    state.tokens = 0


def forget_trained(state: TrainState) -> None:
    with torch.no_grad():
        next(p for p in state.model.parameters() if p.requires_grad).zero_()


@pytest.mark.parametrize("forget", [forget_moments, forget_step, forget_tokens, forget_trained])
@pytest.mark.parametrize("optimizer", ["adamw", "lion_8bit", "sgd"])
def test_resume_without_part_of_state_gives_another_end(
    optimizer: str, forget: Callable[[TrainState], None], tmp_path: Path
):
    setup = Setup("full", optimizer)
    uninterrupted(setup, tmp_path)
    state = setup.fresh()
    read_state(state, tmp_path / "2")
    forget(state)
    for _ in setup.steps(state):
        pass
    assert not are_equal(contents(saved(state, tmp_path / "resumed")), contents(tmp_path / "5"))


# Refusals


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    written = json.loads((folder / STATE).read_text())
    change(written)
    (folder / STATE).write_text(json.dumps(written))


def retensored(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


NAME = "model.norm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / TRAINED).unlink(), f"lacks {TRAINED}"),
    "no moments": (lambda f: (f / OPTIMIZER).unlink(), f"lacks {OPTIMIZER}"),
    "no counters": (lambda f: (f / STATE).unlink(), f"lacks {STATE}"),
    **{
        f"no {counter}": (
            lambda f, counter=counter: rewritten(f, lambda written: written["counters"].pop(counter)),
            f"lacks the counter {counter}",
        )
        for counter in COUNTERS
    },
    "no scaler": (lambda f: rewritten(f, lambda written: written.pop("scaler")), "damaged at scaler"),
    "a weight less": (lambda f: retensored(f / TRAINED, lambda t: t.pop(NAME)), f"lacks {NAME}"),
    "a weight more": (
        lambda f: retensored(f / TRAINED, lambda t: t.update(stranger=torch.ones(1))),
        "has stranger, and the model does not",
    ),
    "another shape": (lambda f: retensored(f / TRAINED, lambda t: t.update({NAME: torch.ones(3)})), r"\(3,\)"),
    "another dtype": (lambda f: retensored(f / TRAINED, lambda t: t.update({NAME: t[NAME].half()})), "float16"),
    "a moment less": (
        lambda f: retensored(f / OPTIMIZER, lambda t: t.pop(f"{NAME}:exp_avg")),
        f"lacks the optimizer's state of {NAME}:exp_avg",
    ),
    "a moment more": (
        lambda f: retensored(f / OPTIMIZER, lambda t: t.update({f"{NAME}:other": torch.ones(1)})),
        f"optimizer state of {NAME}:other",
    ),
    "a parameter less": (
        lambda f: rewritten(f, lambda written: written["optimizer"].pop(NAME)),
        f"lacks the optimizer's state of {NAME}",
    ),
    "a parameter more": (
        lambda f: rewritten(f, lambda written: written["optimizer"].update(stranger={"tensors": [], "values": {}})),
        "optimizer state of stranger",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Writes an intact checkpoint."""
    setup = Setup("full", "adamw")
    state = setup.fresh()
    next(setup.steps(state))
    return lambda folder: saved(state, folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_read_refuses_incomplete_checkpoint(damage: str, whole: Callable[[Path], Path], tmp_path: Path):
    folder = whole(tmp_path / "checkpoint")
    read_state(Setup("full", "adamw").fresh(), folder)
    act, message = DAMAGES[damage]
    act(folder)
    with pytest.raises(RefusedError, match=message):
        read_state(Setup("full", "adamw").fresh(), folder)


# What must never be written


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("location", ["weight", "moment"])
def test_write_refuses_non_finite_values(location: str, value: float, tmp_path: Path):
    setup = Setup("full", "adamw")
    state = setup.fresh()
    next(setup.steps(state))
    weight = dict(state.model.named_parameters())[NAME]
    with torch.no_grad():
        (weight if location == "weight" else state.optimizer.state[weight]["exp_avg"])[3] = value
    with pytest.raises(DivergedError, match=NAME):
        write_state(state, tmp_path)
    assert not list(tmp_path.iterdir())


def test_write_refuses_full_disk_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Usage(NamedTuple):
        free: int = 1000

    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: Usage())
    with pytest.raises(EnvironmentFault, match=r"0\.\d MB are needed, and 0\.0 MB are free"):
        write_state(Setup("full", "sgd").fresh(), tmp_path)
    assert not list(tmp_path.iterdir())


# Scaling of float16 losses


def test_float16_loss_scale_is_restored(tmp_path: Path):
    setup = Setup("full", "sgd")
    state = setup.fresh(dtype=torch.float16)
    next(setup.steps(state))
    state.scaler.update(1234.0)
    fresh = setup.fresh(dtype=torch.float16)
    read_state(fresh, saved(state, tmp_path / "checkpoint"))
    assert fresh.scaler.state_dict() == state.scaler.state_dict()
    assert fresh.scaler.get_scale() == 1234.0


@pytest.mark.parametrize(("method", "made"), [("pissa", "lora_start_A"), ("vera", "vera_A")])
def test_tensors_computed_by_method_are_restored(method: str, made: str):
    state, other = Setup(method, "sgd").fresh(), Setup(method, "sgd").fresh()
    kept = state.method.state(state.model)
    assert any(made in name for name in kept)
    with torch.no_grad():
        for tensor in other.method.own_tensors(other.model).values():
            tensor.add_(1e-6)  # as with another version of a library
    other.method.restore(other.model, kept)
    restored = other.method.state(other.model)
    assert all(torch.equal(restored[name], tensor) for name, tensor in kept.items())


def test_method_state_names_trainable_parameters():
    state = Setup("lora", "sgd").fresh()
    tensors = state.method.state(state.model)
    assert tensors
    assert all("lora_" in name for name in tensors)
    trained = {name for name, parameter in state.model.named_parameters() if parameter.requires_grad}
    assert tensors.keys() == trained

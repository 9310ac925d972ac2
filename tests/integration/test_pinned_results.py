"""Losses, weights and exit codes equal those of `pinned_results.json`, which `tests.fixtures.pinned` writes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import pinned

PINNED: dict[str, Any] = json.loads(pinned.RESULTS.read_text(encoding="utf-8"))
CASES = [pytest.param(name, marks=[pytest.mark.slow] if case.is_slow else []) for name, case in pinned.cases().items()]


@pytest.fixture
def models(tiny_model: Path, tiny_tool_model: Path) -> pinned.Models:
    return pinned.Models(tiny_model, tiny_tool_model)


@cache
def is_recorded_machine() -> bool:
    """Whether bit equality holds: the same processor, device and versions of packages as in the file."""
    return PINNED["machine"] == pinned.machine()


@pytest.mark.parametrize("name", CASES)
def test_training_of_five_steps_equals_pinned_results(name: str, models: pinned.Models, tmp_path: Path):
    expected = PINNED["results"][name]
    found = pinned.measured(name, models, tmp_path)
    assert found["exit_code"] == expected["exit_code"]
    if expected["exit_code"] != 0:
        return
    assert len(found["losses"]) == pinned.STEPS
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert found["validation_losses"] == pytest.approx(expected["validation_losses"], rel=1e-4)
    assert found["gradient_norms"] == pytest.approx(expected["gradient_norms"], rel=1e-3)
    assert found["learning_rates"] == pytest.approx(expected["learning_rates"], rel=1e-9)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-3)
    assert (found["tokens"], found["tensors"]) == (expected["tokens"], expected["tensors"])
    if is_recorded_machine():
        assert found["sha256"] == expected["sha256"]


@pytest.mark.parametrize("name", pinned.faults())
def test_exit_code_of_faulty_input_equals_pinned_code(name: str, models: pinned.Models, tmp_path: Path):
    assert pinned.exit_code(name, models, tmp_path) == PINNED["exit_codes"][name]


def test_pinned_results_name_every_case():
    assert PINNED["results"].keys() == pinned.cases().keys()
    assert PINNED["exit_codes"].keys() == pinned.faults().keys()

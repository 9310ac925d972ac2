"""Compiled blocks match the eager reference in losses and gradients, for rows of any length."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from finetune.errors import UnsupportedError
from finetune.models.kernels.compiled import compile_blocks
from finetune.train.loss import summed_cross_entropy
from tests.unit.models.methods import KINDS, PROMPTS, attached, base_of, outcome, rows


@pytest.fixture(autouse=True)
def _forget_after() -> Any:
    yield
    torch._dynamo.reset()


def model_of(kind: str, folder: Path, *, compiled: bool, recomputes: bool = False) -> nn.Module:
    base = base_of(kind, folder)
    if compiled:
        compile_blocks(base)
    if recomputes:
        base.activation_checkpointing_enable({"use_reentrant": False})
    return attached(kind, base, folder)


def assert_agree(kind: str, folder: Path, *, recomputes: bool = False) -> None:
    counters.clear()
    own, ours = (model_of(kind, folder, compiled=compiled, recomputes=recomputes) for compiled in (False, True))
    for lengths in ([40, 31], [12, 50, 9], [77]):
        batch = rows(kind, lengths)
        (loss, gradients), (found_loss, found) = outcome(own, batch), outcome(ours, batch)
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name
    # One graph for the block, or one before and one after packed attention, which is not compiled.
    assert counters["stats"]["unique_graphs"] >= (2 if kind in PROMPTS else 4)


@pytest.mark.slow
def test_compiled_blocks_match_eager_losses_and_gradients_for_any_length(tiny_model: Path):
    assert_agree("lora", tiny_model)
    assert counters["stats"]["unique_graphs"] <= 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora"])
def test_compiled_blocks_match_eager_losses_and_gradients_of_every_method(kind: str, tiny_model: Path):
    assert_agree(kind, tiny_model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_compiled_blocks_match_eager_with_gradient_checkpointing(kind: str, tiny_model: Path):
    assert_agree(kind, tiny_model, recomputes=True)


def test_compiled_blocks_stay_eager_without_gradients(tiny_model: Path):
    own, ours = (model_of("lora", tiny_model, compiled=compiled) for compiled in (False, True))
    counters.clear()
    with torch.no_grad():
        assert torch.equal(*(summed_cross_entropy(model, rows("lora", [20, 11])) for model in (own, ours)))
    assert counters["stats"]["unique_graphs"] == 0


def test_compile_blocks_without_a_list_of_blocks_raises():
    class Blockless(nn.Module):
        config = None

    with pytest.raises(UnsupportedError, match="no list of blocks"):
        compile_blocks(Blockless())  # type: ignore[arg-type]


def test_compile_blocks_without_a_compiler_is_an_environment_fault(tmp_path: Path):
    code = (
        "from finetune.models.kernels.compiled import compile_blocks; from tests.fixtures.tiny import tiny_llama\n"
        "from finetune.errors import EnvironmentFault\n"
        "try:\n    compile_blocks(tiny_llama())\nexcept EnvironmentFault as fault:\n    print(fault)"
    )
    environment = {**os.environ, "CXX": str(tmp_path / "missing"), "FT_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "nothing can be compiled on this machine" in done.stdout
    assert "g++" in done.stdout

"""Tests run offline, seeded, and write nothing outside their temporary folders."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The tiny model gains nothing from threads, and threads that wait for each other are slow on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"

GPU_TESTS_DEVICE = "FT_GPU_TESTS_DEVICE"
"""Environment variable: `cpu` runs the tests marked `gpu` on a CPU, except what needs CUDA itself (tests/gpu)."""


MODEL_FIXTURES = {"tiny_model", "tiny_tool_model", "tiny_recipe"}
"""Fixtures that build a model: `make test-fast` leaves out the tests that use one."""


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that build a model, and skip those that need a GPU where there is none.

    FT_GPU_TESTS_DEVICE=cpu asks for a dry run of the latter on a CPU.
    """
    for item in items:
        if MODEL_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("model")
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests or os.environ.get(GPU_TESTS_DEVICE) == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where a test marked `gpu` computes: CUDA, or the CPU in a dry run."""
    import torch

    return torch.device("cpu" if os.environ.get(GPU_TESTS_DEVICE) == "cpu" else "cuda")


@pytest.fixture(scope="session")
def cuda(device: torch.device) -> torch.device:
    """The CUDA device, for a test that has no meaning on a CPU; a dry run skips it."""
    if device.type != "cuda":
        pytest.skip("needs CUDA itself")
    return device


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: a random Llama of 2 layers and a byte tokenizer with a chat template. Do not change it."""
    from tests.fixtures.tiny import write_tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tool_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a longer context and a chat template that knows tools. Do not change it."""
    from tests.fixtures.templates import family_tokenizer
    from tests.fixtures.tiny import tiny_llama

    folder = tmp_path_factory.mktemp("models") / "tools"
    tiny_llama(max_position_embeddings=4096).save_pretrained(folder)
    family_tokenizer("qwen2_5").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 chat rows as JSONL. Do not change it."""
    from tests.fixtures.tiny import chat_rows

    file = tmp_path_factory.mktemp("data") / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(32)), encoding="utf-8")
    return file


@pytest.fixture
def tiny_recipe(tiny_model: Path, chat_file: Path, tmp_path: Path) -> dict[str, object]:
    """A recipe as a dictionary of sections, for tests to change: LoRA on the tiny model, 3 steps."""
    return {
        "model": {"name": str(tiny_model)},
        "adapter": {"method": "lora", "r": 4, "alpha": 8},
        "data": {"train": [{"path": str(chat_file), "format": "chat"}], "validation_fraction": 0.25, "max_length": 128},
        "optimizer": {"name": "adamw", "learning_rate": 1e-2},
        "training": {
            "precision": "float32",  # as on every machine, whatever this one is good at
            "max_steps": 3,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
        },
        "evaluation": {"generation_rows": 4, "max_new_tokens": 8, "batch_size": 4},
        "run": {"name": "tiny", "directory": str(tmp_path / "runs")},
    }

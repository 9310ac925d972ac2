"""Too little memory, as under `ulimit -v`, ends a command with exit code 4, and the next try trains."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.fixtures.recipes import write_recipe
from tests.fixtures.tiny import write_tiny_model

from .conftest import Server

WIDTH, INNER = 512, 32_768


@pytest.fixture(scope="module")
def large_recipe(chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of LoRA on a model of 400 MB."""
    folder = tmp_path_factory.mktemp("large")
    write_tiny_model(folder / "model", hidden_size=WIDTH, intermediate_size=INNER)
    sections = {
        "model": {"name": str(folder / "model")},
        "adapter": {"method": "lora", "r": 4},
        "data": {"train": [{"path": str(chat_file), "format": "chat"}], "max_length": 128},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        "training": {"precision": "float32", "max_steps": 2, "micro_batch_size": 2},
    }
    return write_recipe(sections, folder)


def test_memory_for_no_thread_ends_a_run_with_exit_code_7(server: Server, large_recipe: Path, tmp_path: Path):
    before = len(server.errors.read_text())
    limited = server.start("train", large_recipe, "--run-dir", tmp_path / "run", more_memory=4 << 20)
    assert limited.wait() == 7
    assert "starts no further thread" in server.errors.read_text()[before:]


@pytest.mark.parametrize("megabytes", [60, 200, 380, 480])
def test_memory_limit_ends_a_run_with_exit_code_4(server: Server, large_recipe: Path, tmp_path: Path, megabytes: int):
    run = tmp_path / "run"
    before = len(server.errors.read_text())
    limited = server.start("train", large_recipe, "--run-dir", run, more_memory=megabytes << 20)
    assert limited.wait() == 4
    assert "out of memory" in server.errors.read_text()[before:]
    assert "Traceback" not in server.errors.read_text()[before:]
    assert server.start("train", large_recipe, "--run-dir", run).wait() == 0


def test_memory_limit_during_a_merge_leaves_no_folder(server: Server, large_recipe: Path, tmp_path: Path):
    run = tmp_path / "run"
    assert server.start("train", large_recipe, "--run-dir", run).wait() == 0
    assert server.start("merge", run, more_memory=150 << 20).wait() == 4
    assert not [path for path in itertools.chain(run.iterdir(), tmp_path.iterdir()) if "merged" in path.name]
    assert server.start("merge", run).wait() == 0

"""`model.name` with a run, a part of it or an adapter in the place of a model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from finetune.jobs.export.merge import merge
from finetune.jobs.train.run import train
from finetune.run.directory import RunDirectory
from tests.fixtures.recipes import as_recipe, write_recipe
from tests.fixtures.tiny import write_tiny_model

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "r": 4},
    "prompt": {"method": "prompt_tuning", "tokens": 3},
    "prefix": {"method": "prefix_tuning", "tokens": 3},
    "full": {"method": "full"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, chat_file: Path) -> Path:
    """Runs in `runs`, their base, and the adapter of one of them by itself."""
    folder = tmp_path_factory.mktemp("work")
    write_tiny_model(folder / "base")
    for name, adapter in ADAPTERS.items():
        train(as_recipe(sections("./base", chat_file, adapter), folder), RunDirectory.create(folder / "runs" / name))
    shutil.copytree(folder / "runs" / "lora" / "adapter", folder / "alone")
    return folder


def sections(base: str, data: Path, adapter: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {"name": base},
        "adapter": adapter,
        "data": {"train": [{"path": str(data)}], "max_length": 128},
        "training": {"max_steps": 1, "micro_batch_size": 2},
    }


def ft(folder: Path, command: str, base: str, data: Path) -> Result:
    recipe = write_recipe(sections(base, data, {"method": "lora"}), folder)
    more = ["--run-dir", str(folder / "new")] if command == "train" else []
    return CliRunner().invoke(app, [command, str(recipe), *more])


@pytest.mark.parametrize("command", ["validate", "train", "plan"])
@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("runs/lora", ["adapter.continue_from", "{folder}/base", "ft merge"]),
        ("./runs/lora", ["adapter.continue_from", "{folder}/base", "ft merge"]),
        ("runs/lora/adapter", ["adapter.continue_from", "{folder}/base", "ft merge"]),
        ("runs/lora/checkpoints/step-00000001", ["adapter.continue_from", "{folder}/base", "ft merge"]),
        ("runs/prompt", ["adapter.continue_from", "{folder}/base", "ft export"]),
        ("runs/prefix", ["adapter.continue_from", "{folder}/base"]),
        ("runs/full", ["model.name to {folder}/runs/full/model"]),
        ("alone", ["{folder}/base", "adapter.continue_from", "ft merge"]),
    ],
)
def test_run_or_adapter_as_base_names_what_to_write(
    folder: Path, chat_file: Path, command: str, name: str, named: list[str]
):
    result = ft(folder, command, name, chat_file)
    assert result.exit_code == 2
    for text in named:
        assert text.format(folder=folder) in result.stderr
    assert not (folder / "new").exists()
    if name == "runs/prefix":
        assert "ft merge" not in result.stderr


def test_run_without_weights_as_base_is_to_be_finished(folder: Path, chat_file: Path):
    unfinished = folder / "runs" / "unfinished"
    shutil.copytree(folder / "runs" / "lora", unfinished, ignore=shutil.ignore_patterns("adapter"))
    result = ft(folder, "validate", "runs/unfinished", chat_file)
    shutil.rmtree(unfinished)
    assert result.exit_code == 2
    assert "ft train --resume" in result.stderr


@pytest.mark.parametrize("name", ["runs/lor", "runs/r"])
def test_missing_run_as_base_is_a_missing_folder(folder: Path, chat_file: Path, name: str):
    result = ft(folder, "train", name, chat_file)
    assert result.exit_code == 2
    assert "no such folder" in result.stderr
    assert "full, lora, prefix, prompt" in result.stderr
    assert "cache" not in result.stderr


@pytest.mark.parametrize("name", ["elsewhere/r", "org/name"])
def test_name_that_may_be_a_hub_id_is_neither_folder_nor_hub_model(folder: Path, chat_file: Path, name: str):
    result = ft(folder, "train", name, chat_file)
    assert result.exit_code == 7
    assert "no folder of this name" in result.stderr
    assert "relative to the folder of the recipe" in result.stderr


@pytest.mark.parametrize("name", ["gpt2", "org/name"])
def test_hub_id_beside_runs_stays_a_hub_id(folder: Path, chat_file: Path, name: str):
    assert as_recipe(sections(name, chat_file, {"method": "lora"}), folder / "runs").model.is_hub_id


def test_bases_that_messages_name_train(folder: Path, chat_file: Path, tmp_path: Path):
    run = RunDirectory.open(folder / "runs" / "lora")
    merge(run, tmp_path / "merged")
    continued = sections(str(folder / "base"), chat_file, {**ADAPTERS["lora"], "continue_from": str(run.path)})
    full = sections(str(folder / "runs" / "full" / "model"), chat_file, {"method": "lora"})
    merged = sections(str(tmp_path / "merged"), chat_file, {"method": "lora"})
    for number, recipe in enumerate((continued, full, merged)):
        new = RunDirectory.create(tmp_path / str(number))
        train(as_recipe(recipe, tmp_path), new)
        assert new.is_finished

"""`--dtype` of `ft generate`, `ft chat` and `ft eval`: what is computed in, shown and recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from cli.main import app
from finetune.jobs.export.merge import merge
from finetune.jobs.train.run import train
from finetune.models.loading import dtype
from finetune.run.directory import RunDirectory
from tests.fixtures.recipes import as_recipe
from tests.fixtures.tiny import write_tiny_model

PROMPTS = ["Say 1 twice", "A longer prompt than the others, with a number: 1234", "Hi", "x"]
SECTIONS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"method": "lora", "r": 4}},
    "nf4": {"adapter": {"method": "lora", "r": 4}, "quantization": {"kind": "nf4"}},
    "dora": {"adapter": {"method": "lora", "r": 4, "dora": True}},
    "full": {"adapter": {"method": "full"}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, chat_file: Path) -> Path:
    """Runs that were trained in bfloat16, with their merged folders; their answers are not empty."""
    folder = tmp_path_factory.mktemp("runs")
    write_tiny_model(folder / "base", tie_word_embeddings=False, initializer_range=0.3)
    for name, sections in SECTIONS.items():
        recipe = {
            "model": {"name": str(folder / "base")},
            **sections,
            "data": {"train": [{"path": str(chat_file)}], "validation_fraction": 0.25, "max_length": 128},
            "training": {"max_steps": 2, "micro_batch_size": 2, "precision": "bfloat16"},
            "evaluation": {"max_new_tokens": 8},
        }
        run = RunDirectory.create(folder / name)
        train(as_recipe(recipe, folder), run)
        if name != "full":
            _enlarge(run.trained(False) / "adapter_model.safetensors")
        merge(run)
    return folder


def _enlarge(file: Path) -> None:
    """Larger updates, so that rounding them to bfloat16 changes answers."""
    save_file(
        {name: 40 * tensor if "lora_B" in name else tensor for name, tensor in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )


def ft(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def answers(model: Path, *more: str) -> list[str]:
    prompts = [part for text in PROMPTS for part in ("--prompt", text)]
    result = ft("generate", model, *prompts, "--max-new-tokens", 24, *more, "--json")
    assert result.exit_code == 0, result.stderr
    return [row["generated"] for line in result.stdout.splitlines() if "generated" in (row := json.loads(line))]


@pytest.mark.parametrize("name", SECTIONS)
def test_run_and_its_merged_folder_answer_alike_in_float32(runs: Path, name: str):
    own = answers(runs / name, "--dtype", "float32")
    assert own == answers(runs / name / "merged", "--dtype", "float32")
    assert len(set(own)) == len(PROMPTS)


def test_types_change_answers(runs: Path):
    """The control of the test above: without the option, the run answers in the type of its training."""
    own = answers(runs / "nf4")
    assert own == answers(runs / "nf4", "--dtype", "bfloat16")
    assert own != answers(runs / "nf4", "--dtype", "float32")


@pytest.mark.parametrize(
    ("name", "more", "shown"),
    [
        ("lora", (), "computing in bfloat16 (--dtype float32"),
        ("lora", ("--dtype", "float32"), "computing in float32\n"),
        ("full", (), "computing in float32\n"),  # its weights are float32, and generation has no autocast
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_type_of_answers_is_shown(runs: Path, name: str, more: tuple[str, ...], shown: str, command: str):
    prompt = ("--prompt", "Hi") if command == "generate" else ()
    result = ft(command, runs / name, *prompt, "--max-new-tokens", 2, *more)
    assert result.exit_code == 0
    assert shown in result.stderr


@pytest.mark.parametrize("bfloat16", [True, False])
def test_model_computes_in_the_type_that_suits_the_device(runs: Path, monkeypatch: pytest.MonkeyPatch, bfloat16: bool):
    monkeypatch.setattr(dtype, "_has_bfloat16", lambda device: bfloat16)
    result = ft("generate", runs / "lora" / "merged", "--prompt", "Hi", "--max-new-tokens", 2)
    assert f"computing in {'bfloat16' if bfloat16 else 'float32'}" in result.stderr


def test_evaluation_in_float32_of_a_run_and_its_merged_folder_is_equal(runs: Path):
    result = ft("eval", runs / "nf4", "--against", runs / "nf4" / "merged", "--dtype", "float32")
    assert result.exit_code == 0
    assert "computed in float32\n" in result.stdout
    assert "computes in" not in result.stderr  # no type had to be changed for the comparison
    found = json.loads((runs / "nf4" / "eval" / "results.json").read_text())
    assert (found["compute_dtype"], found["generation_dtype"]) == ("float32", "float32")
    loss = found["tasks"]["validation"]["loss"]
    assert abs(loss["value"] - loss["against"]["value"]) < 1e-5
    in_training = ft("eval", runs / "nf4", "--json").stdout.splitlines()[-1]
    assert abs(json.loads(in_training)["tasks"]["validation"]["loss"]["value"] - loss["value"]) > 1e-5


def test_evaluation_shows_both_types_of_a_full_run(runs: Path):
    assert "computed in bfloat16, answers generated in float32" in ft("eval", runs / "full").stdout


@pytest.mark.parametrize("name", ["lora", "lora/merged"])
def test_float16_on_a_cpu_is_refused_with_the_option(runs: Path, name: str):
    result = ft("generate", runs / name, "--prompt", "Hi", "--dtype", "float16")
    assert result.exit_code == 7
    assert "--dtype" in result.stderr
    assert "training.precision" not in result.stderr


def test_run_of_another_device_names_the_option(runs: Path, tmp_path: Path):
    """A run that was trained in float16 on a GPU answers on a CPU in another type."""
    run = tmp_path / "gpu"
    shutil.copytree(runs / "lora", run, ignore=shutil.ignore_patterns("merged"))
    resolved = run / "recipe.resolved.yaml"
    resolved.write_text(resolved.read_text().replace("precision: bfloat16", "precision: float16"))
    assert "--dtype" in ft("generate", run, "--prompt", "Hi").stderr
    assert ft("generate", run, "--prompt", "Hi", "--dtype", "float32", "--max-new-tokens", 2).exit_code == 0


def test_checkpoint_and_adapter_folder_take_a_type(runs: Path):
    expected = answers(runs / "lora", "--dtype", "float32")
    assert answers(runs / "lora" / "adapter", "--dtype", "float32") == expected
    checkpoint = next((runs / "lora" / "checkpoints").glob("step-*"))
    result = ft("generate", checkpoint, "--prompt", "Hi", "--max-new-tokens", 2, "--dtype", "float32")
    assert "computing in float32\n" in result.stderr


def test_several_models_compute_in_one_type(runs: Path, tmp_path: Path):
    """Runs that were trained in two types over one base share it in the type of the option."""
    other = tmp_path / "float32"
    shutil.copytree(runs / "dora", other, ignore=shutil.ignore_patterns("merged"))
    resolved = other / "recipe.resolved.yaml"
    resolved.write_text(resolved.read_text().replace("precision: bfloat16", "precision: float32"))
    refused = ft("generate", runs / "lora", other, "--prompt", "Hi", "--max-new-tokens", 4)
    assert refused.exit_code == 6
    assert "--dtype" in refused.stderr
    assert ft("generate", runs / "lora", other, "--prompt", "Hi", "--dtype", "float32").exit_code == 0

"""Exports side by side under a run, and what is refused before weights are read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from finetune.jobs.export.prompt_tokens import export as export_prompt
from finetune.jobs.load.training_record import TrainingRecord
from finetune.models.loading.layerwise import StreamedModel
from finetune.report.run_metadata import RunMetadata
from tests.fixtures.merging import merging_tokenizer
from tests.fixtures.tiny import CHAT_TEMPLATE, write_tiny_model
from tests.integration.test_merging import ARCHITECTURES, run_of, write_model

LORA = {"adapter": {"method": "lora", "r": 4}}
THREE_BITS = {"quantization": {"kind": "affine", "bits": 3}, "adapter": {"method": "qa_lora", "r": 4}}
MIXED = {
    "quantization": {"kind": "affine", "bits": 4, "group_size": 32},
    "modules": [{"match": "*.down_proj", "quantization": {"kind": "affine", "bits": 8, "group_size": 32}}],
    "adapter": {"method": "qa_lora", "r": 4},
}
NEW_TOKENS = {"adapter": {"method": "lora"}, "model": {"new_tokens": ["<tool>"]}}


def ft(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_exports_of_all_formats_and_types_lie_side_by_side(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = run_of({**tiny_recipe, **LORA}, tmp_path)
    wanted = {
        "adapter": ["adapter"],
        "gguf-adapter": ["gguf-adapter"],
        "gguf-f16": ["gguf"],
        "gguf-q8_0": ["gguf", "--dtype", "q8_0"],
    }
    before: dict[str, dict[str, str]] = {}
    for name, arguments in wanted.items():
        result = ft("export", run.path, "--format", *arguments, "--quiet")
        assert result.exit_code == 0, result.stderr
        assert str(run.exported / name) in result.stdout.replace("\n", "")
        for earlier, files in before.items():
            assert digests(run.exported / earlier) == files
        before[name] = digests(run.exported / name)
    assert ft("merge", run.path).exit_code == 0
    assert {folder.name for folder in run.exported.iterdir()} == set(wanted)
    shown = RunMetadata.of(run).verifications
    assert set(shown) == {"merged", "exported/gguf-f16", "exported/gguf-q8_0"}


def test_types_of_a_prompt_lie_side_by_side(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = run_of({**tiny_recipe, "adapter": {"method": "prompt_tuning", "tokens": 3}}, tmp_path)
    folders = [export_prompt(run, dtype=dtype).folder for dtype in ("float32", "bfloat16")]
    assert folders == [run.exported / "prompt-float32", run.exported / "prompt-bfloat16"]


def test_same_format_and_type_is_refused_and_replaced_on_request(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = run_of({**tiny_recipe, **LORA}, tmp_path)
    assert ft("export", run.path, "--format", "gguf").exit_code == 0
    again = ft("export", run.path, "--format", "gguf", "--dtype", "f16")
    assert again.exit_code == 6
    assert "gguf-f16" in again.stderr
    assert ft("export", run.path, "--format", "gguf", "--overwrite").exit_code == 0


def test_export_of_an_earlier_version_stays_and_is_shown(tiny_recipe: dict[str, Any], tmp_path: Path):
    """It lies in `exported/` itself."""
    run = run_of({**tiny_recipe, **LORA}, tmp_path)
    assert ft("export", run.path, "--format", "gguf", "--output", run.exported).exit_code == 0
    assert ft("export", run.path, "--format", "gguf").exit_code == 0
    assert (run.exported / "model.gguf").is_file()
    assert set(RunMetadata.of(run).verifications) == {"exported", "exported/gguf-f16"}


def of_architecture(name: str) -> Callable[[Path], None]:
    return lambda folder: write_model(ARCHITECTURES[name], folder)


def scaled_positions(folder: Path) -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    write_tiny_model(folder, rope_parameters=scaled)


def words_of_sentencepiece(folder: Path) -> None:
    write_tiny_model(folder, vocab_size=800)
    merging_tokenizer("metaspace", CHAT_TEMPLATE).save_pretrained(folder)


CASES: dict[str, tuple[dict[str, Any], Callable[[Path], None] | None, list[str], str]] = {
    "gguf: architecture": (LORA, of_architecture("phi3"), ["export", "--format", "gguf"], "phi3"),
    "gguf: positions": (LORA, scaled_positions, ["export", "--format", "gguf"], "scaled positions"),
    "gguf: tokenizer": (LORA, words_of_sentencepiece, ["export", "--format", "gguf"], "byte-level"),
    "gguf: method": (
        {"adapter": {"method": "prefix_tuning", "tokens": 2}},
        None,
        ["export", "--format", "gguf"],
        "prefix",
    ),
    "gguf: codes": (LORA, None, ["export", "--format", "gguf", "--dtype", "q4_1"], "--dtype q4_1"),
    "gguf: bits": (THREE_BITS, None, ["export", "--format", "gguf", "--dtype", "q4_1"], "4 bits in groups of 32"),
    "gguf: mixed": (MIXED, None, ["export", "--format", "gguf", "--dtype", "q4_1"], "down_proj"),
    "gguf-adapter: architecture": (LORA, of_architecture("phi3"), ["export", "--format", "gguf-adapter"], "phi3"),
    "gguf-adapter: dora": (
        {"adapter": {"method": "lora", "dora": True}},
        None,
        ["export", "--format", "gguf-adapter"],
        "adapter.dora",
    ),
    "adapter: tokens": (NEW_TOKENS, None, ["export", "--format", "adapter"], "model.new_tokens"),
    "adapter: method": ({"adapter": {"method": "loha", "r": 2}}, None, ["export", "--format", "adapter"], "loha"),
    "prompt": (LORA, None, ["export"], "does not train a prompt"),
    "merge: method": ({"adapter": {"method": "prefix_tuning", "tokens": 2}}, None, ["merge"], "prefix"),
    "merge: codes": (LORA, None, ["merge", "--dtype", "quantized"], "without rounding"),
    "combine": (
        {"adapter": {"method": "prefix_tuning", "tokens": 2}},
        None,
        ["merge", "--weights", "0.5"],
        "prefix",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_unsupported_output_is_refused_before_weights_are_read(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    """Also before it is said that the folder exists: another one would not help."""
    sections, write, (command, *options), word = CASES[name]
    if write is not None:
        write(tmp_path / "base")
        sections = {**sections, "model": {"name": str(tmp_path / "base")}}
    elif "model" in sections:
        sections = {**sections, "model": {**tiny_recipe["model"], **sections["model"]}}
    run = run_of({**tiny_recipe, **sections}, tmp_path)
    target = tmp_path / "taken"
    target.mkdir()

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("it reads weights")

    monkeypatch.setattr(TrainingRecord, "refuse_others", read)
    monkeypatch.setattr(StreamedModel, "__init__", read)
    result = ft(command, run.path, *options, "--output", target)
    assert result.exit_code == 2, result.output
    assert word in result.stderr
    assert "exists already" not in result.stderr


def test_supported_output_reads_weights(tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The control of the test above, and the folder is checked before weights are read, too."""
    run = run_of({**tiny_recipe, **LORA}, tmp_path)

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("it reads weights")

    monkeypatch.setattr(TrainingRecord, "refuse_others", read)
    assert isinstance(ft("export", run.path, "--format", "gguf").exception, AssertionError)
    run.export_folder("gguf", "f16").mkdir(parents=True)
    assert ft("export", run.path, "--format", "gguf").exit_code == 6


@pytest.mark.parametrize("name", ["a b", "org/na/me", "-x", "org/.."])
def test_repository_that_the_hub_cannot_have_is_refused_before_the_export(
    tiny_recipe: dict[str, Any], tmp_path: Path, name: str
):
    run = run_of({**tiny_recipe, **LORA}, tmp_path)
    result = ft("export", run.path, "--format", "adapter", f"--push={name}")
    assert result.exit_code == 2
    assert "--push" in result.stderr
    assert not run.exported.exists()

"""`ft quantize`, and the calibration cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import finetune.jobs.load.calibration_cache
from cli.main import app
from finetune.errors import ModelError, RefusedError, UnsupportedError
from finetune.jobs.export.merge import merge
from finetune.jobs.export.quantize import quantize
from finetune.jobs.load.context import TrainingContext
from finetune.jobs.train.run import train
from finetune.quantizers.affine import AffineQuantizer
from finetune.quantizers.layer import QuantizedLinear
from finetune.run.directory import RunDirectory
from finetune.run.events import ignore
from tests.fixtures.eval_helpers import evaluated
from tests.fixtures.recipes import as_recipe, write_recipe
from tests.fixtures.tiny import write_tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "affine": {"kind": "affine", "bits": 3},
    "hqq": {"kind": "hqq", "bits": 2, "group_size": 64},
    "optq": {"kind": "optq", "bits": 3, "calibration_rows": 8},
    "nf4": {"kind": "nf4"},
    "fp4": {"kind": "fp4", "double_quant": False},
    "icq": {"kind": "icq", "candidates": 4},
}
OPTQ = KINDS["optq"]


@pytest.fixture
def calibrations(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The rows of each calibration."""
    seen: list[list[list[int]]] = []
    real = finetune.jobs.load.calibration_cache.quantize_by_inputs

    def watched(model: Any, quantizer: Any, rows: Any, *rest: Any) -> Any:
        seen.append(rows)
        return real(model, quantizer, rows, *rest)

    monkeypatch.setattr(finetune.jobs.load.calibration_cache, "quantize_by_inputs", watched)
    return seen


def quantized(sections: dict[str, Any], folder: Path, *overrides: str, name: str = "out") -> Path:
    return quantize(as_recipe(sections, folder, overrides), folder / name).folder


def packed(sections: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """Codes and scales of the base that a recipe loads."""
    model = TrainingContext.of(as_recipe(sections, folder), ignore).load_base(ignore)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    return {f"{prefix}.{name}": t for prefix, layer in layers.items() for name, t in layer.packed().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_folder_has_the_weights_that_the_recipe_trains_over(
    tiny_recipe: dict[str, Any], tmp_path: Path, kind: str
):
    sections = {**tiny_recipe, "quantization": KINDS[kind]}
    folder = quantized(sections, tmp_path)
    by_name = {**tiny_recipe, "model": {"name": str(folder)}}
    assert same(packed(by_name, tmp_path), packed(sections, tmp_path))
    assert (folder / "chat_template.jinja").is_file()


def test_quantized_folder_can_be_trained_over_and_merged(tiny_recipe: dict[str, Any], tmp_path: Path):
    folder = quantized({**tiny_recipe, "quantization": OPTQ}, tmp_path)
    run = RunDirectory.create(tmp_path / "run")
    train(as_recipe({**tiny_recipe, "model": {"name": str(folder)}}, tmp_path), run)
    assert merge(run).agreement.relative_difference <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_record_has_sizes_and_errors(tiny_recipe: dict[str, Any], tiny_model: Path, tmp_path: Path, kind: str):
    folder = quantized({**tiny_recipe, "quantization": KINDS[kind]}, tmp_path)
    record = json.loads((folder / "quantize.json").read_text())
    tensors, plain = load_file(folder / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    assert (record["layer_count"], len(record["layers"])) == (14, 14)
    names = [name for name in tensors if name.rpartition(".")[0] in record["layers"]]
    weights = sum(plain[f"{name}.weight"].numel() for name in record["layers"])
    stored = 8 * sum(tensors[name].nbytes for name in names)
    assert record["bits_per_weight"] == pytest.approx(stored / weights, rel=1e-9)
    assert record["bytes_after"] == (folder / "model.safetensors").stat().st_size < record["bytes_before"]
    assert record["quantization"].items() >= KINDS[kind].items()
    assert 0.05 < record["weight_error"] < 0.6
    if kind == "optq":
        assert 0 < record["output_error"] < record["nearest_output_error"]
    else:
        assert record["output_error"] is record["nearest_output_error"] is None


def test_quantize_record_has_the_error_of_each_weight(tiny_recipe: dict[str, Any], tiny_model: Path, tmp_path: Path):
    sections = {**tiny_recipe, "quantization": KINDS["affine"]}
    record = json.loads((quantized(sections, tmp_path) / "quantize.json").read_text())
    model = TrainingContext.of(as_recipe(sections, tmp_path), ignore).load_base(ignore)
    name = "model.layers.1.mlp.down_proj"
    weight = load_file(tiny_model / "model.safetensors")[f"{name}.weight"]
    off = model.get_submodule(name).dequantized(torch.float32) - weight
    assert record["layers"][name]["weight_error"] == pytest.approx(float(off.norm() / weight.norm()), rel=1e-6)


def test_optq_folder_loads_as_affine(tiny_recipe: dict[str, Any], tmp_path: Path):
    sections = {**tiny_recipe, "quantization": OPTQ}
    folder = quantized(sections, tmp_path)
    before = packed({**tiny_recipe, "model": {"name": str(folder)}}, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (section,) = config["quantization_config"]["quantizers"]
    config["quantization_config"]["quantizers"] = [
        {
            key: value
            for key, value in {**section, "kind": "affine"}.items()
            if key not in ("calibration_rows", "damping")
        }
    ]
    (folder / "config.json").write_text(json.dumps(config))
    assert same(packed({**tiny_recipe, "model": {"name": str(folder)}}, tmp_path), before)
    model = TrainingContext.of(as_recipe({**tiny_recipe, "model": {"name": str(folder)}}, tmp_path), ignore).load_base(
        ignore
    )
    assert type(model.get_submodule("model.layers.0.mlp.up_proj").quantizer) is AffineQuantizer


def test_calibration_runs_once_for_all_users_of_a_base(
    tiny_recipe: dict[str, Any], tmp_path: Path, calibrations: list[list[list[int]]]
):
    sections = {**tiny_recipe, "quantization": OPTQ}
    run = RunDirectory.create(tmp_path / "run")
    train(as_recipe(sections, tmp_path), run)
    first = packed(sections, tmp_path)
    assert evaluated(run, "base").scores["validation"]["f1"].rows == 4
    assert merge(run).agreement.relative_difference <= 1e-5
    quantized(sections, tmp_path)
    assert same(packed(sections, tmp_path), first)
    (rows,) = calibrations
    assert len(rows) == 8


def test_calibration_after_removal_from_the_cache_is_bitwise_the_same(
    tiny_recipe: dict[str, Any], tmp_path: Path, calibrations: list[list[list[int]]]
):
    sections = {**tiny_recipe, "quantization": OPTQ}
    first = packed(sections, tmp_path)
    shutil.rmtree(tmp_path / "cache" / "quantized")
    assert same(packed(sections, tmp_path), first)
    assert len(calibrations) == 2
    assert calibrations[0] == calibrations[1]


@pytest.mark.parametrize("change", ["base", "bits", "damping", "rows", "seed", "algorithm"])
def test_calibration_cache_has_an_entry_for_each_input(
    tiny_recipe: dict[str, Any],
    tmp_path: Path,
    calibrations: list[list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
    change: str,
):
    write_tiny_model(tmp_path / "base")
    sections = {**tiny_recipe, "model": {"name": str(tmp_path / "base")}, "quantization": OPTQ}
    packed(sections, tmp_path)
    match change:
        case "base":  # one weight of it
            file = tmp_path / "base" / "model.safetensors"
            tensors = load_file(file)
            tensors["model.layers.0.mlp.up_proj.weight"][3, 5] += 1e-3
            save_file(tensors, file, metadata={"format": "pt"})
        case "bits" | "damping":
            sections["quantization"] = {**OPTQ, change: {"bits": 2, "damping": 0.1}[change]}
        case "rows":
            source = {**tiny_recipe["data"]["train"][0], "rows": 20}
            sections["data"] = {**tiny_recipe["data"], "train": [source]}
        case "seed":
            sections["training"] = {**sections["training"], "seed": 5}
        case "algorithm":
            monkeypatch.setattr(finetune.jobs.load.calibration_cache, "ALGORITHM", 0)
    packed(sections, tmp_path)
    assert len(calibrations) == 2
    assert (calibrations[0] == calibrations[1]) is (change not in ("rows", "seed"))


def test_failed_calibration_leaves_no_cache_entry(tiny_recipe: dict[str, Any], tmp_path: Path):
    write_tiny_model(tmp_path / "odd", intermediate_size=80)
    sections = {**tiny_recipe, "model": {"name": str(tmp_path / "odd")}, "quantization": OPTQ}
    with pytest.raises(UnsupportedError, match="80 inputs"):
        packed(sections, tmp_path)
    assert list((tmp_path / "cache" / "quantized").iterdir()) == []


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_quantize_refuses_kinds_without_a_file_format_before_loading(
    tiny_recipe: dict[str, Any], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(TrainingContext, "load_base", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UnsupportedError) as caught:
        quantized({**tiny_recipe, "quantization": {"kind": kind}}, tmp_path)
    assert (caught.value.where, "optq" in str(caught.value.hint)) == ("quantization.kind", True)
    assert not (tmp_path / "out").exists()


def test_quantize_refuses_a_quantized_model(tiny_recipe: dict[str, Any], tmp_path: Path):
    sections = {**tiny_recipe, "quantization": KINDS["affine"]}
    folder = quantized(sections, tmp_path)
    with pytest.raises(ModelError, match="quantized already"):
        quantized({**sections, "model": {"name": str(folder)}}, tmp_path, name="again")


def test_quantize_replaces_a_folder_only_with_overwrite(tiny_recipe: dict[str, Any], tmp_path: Path):
    sections = {**tiny_recipe, "quantization": KINDS["affine"]}
    folder = quantized(sections, tmp_path)
    before = (folder / "config.json").read_bytes()
    recipe = as_recipe(sections, tmp_path, ["quantization.bits=4"])
    with pytest.raises(RefusedError, match="already"):
        quantize(recipe, folder)
    assert (folder / "config.json").read_bytes() == before
    quantize(recipe, folder, overwrite=True)
    assert (folder / "config.json").read_bytes() != before
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".out")] == []


def ft(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["quantize", *arguments])


def test_quantize_command_shows_sizes_and_errors(tiny_recipe: dict[str, Any], tmp_path: Path):
    recipe = write_recipe({**tiny_recipe, "quantization": OPTQ}, tmp_path)
    result = ft(str(recipe), "--output", str(tmp_path / "out"), "--quiet")
    assert result.exit_code == 0, result.output
    for part in ("14 layers in optq", "32.000", "4.000", "round-to-nearest", f"quantized model: {tmp_path / 'out'}"):
        assert part in result.stdout
    assert ft(str(recipe), "--output", str(tmp_path / "out")).exit_code == 6


def test_quantize_json_ends_with_the_record(tiny_recipe: dict[str, Any], tmp_path: Path):
    recipe = write_recipe({**tiny_recipe, "quantization": {"kind": "none"}}, tmp_path)
    output = tmp_path / "out"
    result = ft(str(recipe), "--output", str(output), "--set", "quantization={kind: affine}", "--json")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert (events[-1]["event"], events[-1]["folder"], events[-1]["kind"]) == ("quantized", str(output), "affine")
    written = json.loads((output / "quantize.json").read_text())
    assert (
        written.items() >= {key: value for key, value in events[-1].items() if key not in ("event", "folder")}.items()
    )
    refused = ft(str(recipe), "--output", str(tmp_path / "none"), "--json")
    assert json.loads(refused.stdout.splitlines()[-1])["where"].endswith(": quantization.kind")

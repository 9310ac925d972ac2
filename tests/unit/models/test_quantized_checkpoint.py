"""Folders of quantized weights: written and loaded bit for bit, and nothing else gets through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from finetune.adapters.full import FullMethod
from finetune.errors import ModelError, UnsupportedError
from finetune.models.loading.quantized_checkpoint import save_quantized
from finetune.quantizers.layer import QuantizedLinear
from finetune.recipe.sections.adapter import Full
from finetune.recipe.sections.quantization import QuantizationSection
from tests.unit.quantizers.loading import PACKED, gradients, load, logits, section, with_lora


def packed_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    return {f"{prefix}.{name}": t for prefix, layer in layers.items() for name, t in layer.packed().items()}


@pytest.mark.parametrize("chosen", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantized_checkpoint_reloads_bit_for_bit(
    tiny_model: Path, tmp_path: Path, chosen: QuantizationSection, dtype: torch.dtype
):
    """Whatever type the other weights are loaded in, scales keep their own."""
    model = load(tiny_model, chosen, dtype)
    save_quantized(model, tmp_path)
    again = load(tmp_path, dtype=dtype)
    before, after = packed_tensors(model), packed_tensors(again)
    assert len(before) >= 2 * 14
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert torch.equal(logits(again), logits(model))


def test_quantized_checkpoint_trains_like_the_original(tiny_model: Path, tmp_path: Path):
    model = load(tiny_model, PACKED["affine-3"])
    save_quantized(model, tmp_path)
    first, second = gradients(with_lora(model)), gradients(with_lora(load(tmp_path)))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_quantized_checkpoint_saved_again_is_identical(tiny_model: Path, tmp_path: Path):
    save_quantized(load(tiny_model, PACKED["icq-3"]), tmp_path / "one")
    save_quantized(load(tmp_path / "one"), tmp_path / "two")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_quantized_checkpoint_is_as_small_as_its_codes(tiny_model: Path, tmp_path: Path):
    model = load(tiny_model, PACKED["nf4"])
    save_quantized(model, tmp_path)
    packed = packed_tensors(model)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert packed.keys() <= stored.keys()
    assert all(stored[name] == "U8" for name in packed if name.endswith((".weight", ".absmax")))


def test_recipe_with_another_quantizer_than_the_checkpoint_is_refused(tiny_model: Path, tmp_path: Path):
    model = load(tiny_model, PACKED["hqq-4"])
    save_quantized(model, tmp_path)
    assert torch.equal(logits(load(tmp_path, PACKED["hqq-4"])), logits(model))
    with pytest.raises(ModelError, match="already quantized, to hqq"):
        load(tmp_path, PACKED["affine-4"])


def test_quantized_checkpoint_weights_are_frozen(tiny_model: Path, tmp_path: Path):
    save_quantized(load(tiny_model, PACKED["affine-4"]), tmp_path)
    with pytest.raises(UnsupportedError, match="cannot be trained"):
        FullMethod(Full(method="full")).attach(load(tmp_path), 1)


@pytest.mark.parametrize("chosen", [section(kind="int8"), section(kind="none")], ids=lambda chosen: chosen.kind)
def test_saving_a_quantizer_without_storage_format_is_refused(
    tiny_model: Path, tmp_path: Path, chosen: QuantizationSection
):
    with pytest.raises(UnsupportedError):
        save_quantized(load(tiny_model, chosen), tmp_path)


def spoil(config: dict[str, Any], how: str) -> None:
    stored = config["quantization_config"]
    match how:
        case "unknown kind":
            stored["quantizers"][0]["kind"] = "mystery"
        case "a class to import":
            stored["quantizers"][0]["implementation"] = "os:system"
        case "a quantizer that is not there":
            stored["layers"] = dict.fromkeys(stored["layers"], 7)
        case "a layer that is not there":
            stored["layers"]["model.layers.9.mlp.up_proj"] = 0
        case "a later version":
            stored["version"] = 2
        case "int8":
            stored["quantizers"] = [{"kind": "int8"}]
        case "other bits":
            stored["quantizers"][0]["bits"] = 8
        case "no quantizers":
            del stored["quantizers"]


@pytest.mark.parametrize(
    "how",
    [
        "unknown kind",
        "a class to import",
        "a quantizer that is not there",
        "a layer that is not there",
        "a later version",
        "int8",
        "other bits",
        "no quantizers",
    ],
)
def test_invalid_quantization_config_is_refused(tiny_model: Path, tmp_path: Path, how: str):
    save_quantized(load(tiny_model, PACKED["affine-4"]), tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    spoil(config, how)
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError):
        load(tmp_path)

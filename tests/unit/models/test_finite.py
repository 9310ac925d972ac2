"""Weights that are NaN or infinite are refused by name, wherever a base is read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import ModelError
from finetune.models.loading.finite import is_finite
from finetune.models.loading.layerwise import StreamedModel
from finetune.models.loading.load import load_model
from finetune.models.loading.model_files import ModelFolder
from finetune.quantizers.choice import Quantizers
from finetune.recipe.sections.model import Model
from tests.fixtures.pinned import ft
from tests.unit.quantizers.loading import PACKED, PLAIN, section

WEIGHTS = {
    "embeddings": "model.embed_tokens.weight",
    "linear": "model.layers.1.mlp.down_proj.weight",
    "norm": "model.layers.0.input_layernorm.weight",
}


def damaged(folder: Path, name: str, value: float, target: Path) -> Path:
    """A copy of a model with one value of one weight replaced."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name].view(-1)[tensors[name].numel() // 3] = value
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "nf4", "affine-4", "hqq-4", "icq-4", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_base_with_a_value_that_is_not_finite_is_refused_by_name(
    tiny_model: Path, tmp_path: Path, weight: str, value: float, kind: str, dtype: torch.dtype
):
    folder = damaged(tiny_model, WEIGHTS[weight], value, tmp_path / "model")
    chosen = PLAIN if kind == "plain" else section(kind="int8") if kind == "int8" else PACKED[kind]
    with pytest.raises(ModelError, match="NaN or infinite") as caught:
        load_model(
            ModelFolder(folder, "base"),
            Model(name=str(folder)),
            Quantizers(chosen),
            weight_dtype=dtype,
            compute_dtype=dtype,
            device=torch.device("cpu"),
        )
    assert WEIGHTS[weight] in str(caught.value)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_layerwise_reading_refuses_it_too(tiny_model: Path, tmp_path: Path, weight: str):
    folder = damaged(tiny_model, WEIGHTS[weight], float("nan"), tmp_path / "model")
    streamed = StreamedModel(
        ModelFolder(folder, "base"), Model(name=str(folder)), Quantizers(PLAIN), torch.device("cpu"), dequantized=True
    )
    with pytest.raises(ModelError, match=WEIGHTS[weight]):
        streamed.fill()


@pytest.mark.parametrize("command", ["quantize", "train"])
def test_command_with_a_damaged_base_ends_with_the_models_exit_code(tiny_model: Path, tmp_path: Path, command: str):
    folder = damaged(tiny_model, WEIGHTS["linear"], float("nan"), tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"text": "one two three four five six"}\n' * 8, encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{name: {folder}}}\n"
        "quantization: {kind: nf4}\n"
        "adapter: {method: lora, r: 2}\n"
        "data: {train: [{path: rows.jsonl, format: text}], max_length: 64}\n"
        "optimizer: {name: adamw}\n"
        "training: {max_steps: 1}\n",
        encoding="utf-8",
    )
    arguments = ["--output", tmp_path / "out"] if command == "quantize" else ["--run-dir", tmp_path / "run"]
    assert ft(command, recipe, *arguments) == ModelError.exit_code
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_is_finite_finds_one_value_anywhere(dtype: torch.dtype):
    tensor = torch.randn(37, 53).to(dtype)
    assert is_finite(tensor)
    assert is_finite(torch.empty(0))
    assert is_finite(torch.zeros(4, dtype=torch.uint8))
    for value in (float("nan"), float("inf"), float("-inf")):
        for place in (0, 1000, -1):
            changed = tensor.clone()
            changed.view(-1)[place] = value
            assert not is_finite(changed)

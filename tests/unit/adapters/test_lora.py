"""LoRA as defined in the paper, over full-precision and quantized bases."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetune.adapters.lora import LoraMethod
from finetune.errors import RefusedError, UnsupportedError
from finetune.models.linear_layers import dequantize_model
from finetune.models.loading.load import load_model
from finetune.models.loading.model_files import ModelFolder
from finetune.quantizers.choice import Quantizers
from finetune.recipe.sections.adapter import Lora
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.quantization import EightBit, FourBit, NoQuantization
from tests.fixtures.merge_helpers import merged

IDS = torch.tensor([[256, 5, 9, 80, 41, 257, 30, 31]])
SECTIONS = [NoQuantization(), FourBit(kind="nf4"), FourBit(kind="fp4"), EightBit(kind="int8")]


def base(folder: Path, section: object = NoQuantization()) -> nn.Module:
    return load_model(
        ModelFolder(folder, "base"),
        Model(name=str(folder)),
        Quantizers(section),
        weight_dtype=torch.float32,
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
    )


def lora(**settings: object) -> LoraMethod:
    return LoraMethod(Lora(**{"method": "lora", "r": 4, "alpha": 8, **settings}))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def trained(model: nn.Module) -> nn.Module:
    """Simulate training: no update is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.kind)
def test_untrained_lora_keeps_logits(tiny_model: Path, section: object):
    model = base(tiny_model, section)
    before = logits(model)
    assert torch.equal(logits(lora().attach(model, 1)), before)


def test_lora_trains_only_a_and_b(tiny_model: Path):
    model = base(tiny_model)
    layers = [layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"]
    expected = sum(4 * (layer.in_features + layer.out_features) for layer in layers)
    attached = lora().attach(model, 1)
    trainable = {name: p for name, p in attached.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)
    assert sum(p.numel() for p in trainable.values()) == expected


def test_lora_update_is_alpha_over_r_times_b_a(tiny_model: Path):
    model = base(tiny_model)
    layer = trained(lora().attach(model, 1)).base_model.model.model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    inputs = torch.randn(3, 64)
    expected = layer.base_layer(inputs) + 8 / 4 * inputs @ a.T @ b.T
    assert torch.allclose(layer(inputs), expected, atol=1e-5)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.kind)
def test_lora_round_trips_through_disk(tiny_model: Path, tmp_path: Path, section: object):
    model = base(tiny_model, section)
    attached = trained(lora().attach(model, 1))
    lora().save(attached, tmp_path)
    again = lora().load(base(tiny_model, section), tmp_path)
    assert torch.equal(logits(again), logits(attached))
    assert not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("section", SECTIONS[:3], ids=lambda section: section.kind)
def test_merged_lora_matches_unmerged(tiny_model: Path, tmp_path: Path, section: object):
    model = base(tiny_model, section)
    attached = trained(lora().attach(model, 1))
    expected = logits(attached)
    lora().save(attached, tmp_path)
    dequantized = dequantize_model(base(tiny_model, section), torch.float32)
    plain = logits(dequantized)
    found = logits(merged(lora(), dequantized, tmp_path))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (expected - plain).abs().max() > 1e-2 * expected.abs().max()  # the update matters
    assert not any("lora_" in name for name, _ in dequantized.named_parameters())


def test_saved_config_has_no_paths_and_integer_alpha(tiny_model: Path, tmp_path: Path):
    model = base(tiny_model)
    lora().save(lora().attach(model, 1), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
    assert config["lora_alpha"] == 8
    assert isinstance(config["lora_alpha"], int)
    assert not (tmp_path / "README.md").exists()


def test_load_refuses_adapter_of_wider_base(tiny_model: Path, tmp_path: Path):
    model = base(tiny_model)
    lora().save(lora().attach(model, 1), tmp_path)
    from tests.fixtures.tiny import write_tiny_model

    write_tiny_model(tmp_path / "wide", intermediate_size=192)
    with pytest.raises(RefusedError):
        lora().load(base(tmp_path / "wide"), tmp_path)


@pytest.mark.parametrize("layers", [1, 3])
def test_load_refuses_adapter_of_other_depth(tiny_model: Path, tmp_path: Path, layers: int):
    model = base(tiny_model)
    lora().save(lora().attach(model, 1), tmp_path)
    from tests.fixtures.tiny import write_tiny_model

    write_tiny_model(tmp_path / "other", num_hidden_layers=layers)
    with pytest.raises(RefusedError):
        lora().load(base(tmp_path / "other"), tmp_path)


def test_unknown_target_modules_error_lists_layers(tiny_model: Path):
    model = base(tiny_model)
    with pytest.raises(UnsupportedError) as caught:
        lora(target_modules=["query"]).attach(model, 1)
    assert "q_proj" in str(caught.value)


def test_target_modules_limit_adapted_layers(tiny_model: Path):
    model = base(tiny_model)
    attached = lora(target_modules=["q_proj", "v_proj"]).attach(model, 1)
    names = [name for name, p in attached.named_parameters() if p.requires_grad]
    assert all(".q_proj." in name or ".v_proj." in name for name in names)
    assert len(names) == 2 * 2 * 2


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda tensor: tensor.index_fill(0, torch.tensor([0]), math.nan), "NaN or infinite"),
        (lambda tensor: tensor.index_fill(1, torch.tensor([1]), -math.inf), "NaN or infinite"),
        (lambda tensor: tensor.to(torch.int32), "type int32"),
        (lambda tensor: tensor.to(torch.bool), "type bool"),
    ],
)
def test_load_refuses_tensors_that_are_not_finite_or_not_floating_point(
    tiny_model: Path, tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], what: str
):
    lora().save(lora().attach(base(tiny_model), 1), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[3]
    save_file({**tensors, name: change(tensors[name]).contiguous()}, file)
    with pytest.raises(RefusedError, match=what) as refusal:
        lora().load(base(tiny_model), tmp_path)
    assert refusal.value.where == str(file)
    assert name in refusal.value.what


def test_load_refuses_damaged_file(tiny_model: Path, tmp_path: Path):
    lora().save(lora().attach(base(tiny_model), 1), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RefusedError, match="damaged"):
        lora().load(base(tiny_model), tmp_path)

"""VeRA, (IA)3, LoHa, LoKr and OFT: initial state, training, saving, merging, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import TypeAdapter

from finetune.errors import RefusedError, UnsupportedError
from finetune.models.linear_layers import dequantize_model
from finetune.recipe.sections.adapter import Adapter
from finetune.resolve import build
from tests.fixtures.merge_helpers import merged
from tests.fixtures.tiny import write_tiny_model
from tests.unit.adapters.test_low_rank import is_close
from tests.unit.quantizers.loading import PACKED, gradients, load, logits

METHODS: dict[str, dict[str, Any]] = {
    "vera": {"r": 16},
    "ia3": {},
    "loha": {"r": 2},
    "lokr": {"r": 2},
    "oft": {"block_size": 8},
}
ON = [(name, kind) for name in METHODS for kind in (None, "nf4", "affine-3")]


def method(name: str, **more: Any) -> Any:
    return build(TypeAdapter(Adapter).validate_python({"method": name, **METHODS[name], **more}), [])


def base(folder: Path, kind: str | None) -> Any:
    return load(folder, PACKED[kind]) if kind else load(folder)


def trained(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_needs_full_precision_lists_ia3_loha_lokr():
    needing = {name for name in METHODS if method(name).section.needs_full_precision}
    assert needing == {"ia3", "loha", "lokr"}


@pytest.mark.parametrize(("name", "kind"), ON)
def test_peft_method_trains_saves_reloads_and_merges(tiny_model: Path, tmp_path: Path, name: str, kind: str | None):
    chosen = method(name)
    if kind and chosen.section.needs_full_precision:
        pytest.skip("a recipe rule refuses it over quantized weights")
    plain = logits(base(tiny_model, kind))
    model = chosen.attach(base(tiny_model, kind), 1)
    assert is_close(logits(model), plain, 1e-5)
    model = trained(model)
    assert all(gradient.abs().sum() > 0 for gradient in gradients(model).values())
    expected = logits(model.eval())
    assert not is_close(plain, expected, 1e-2)
    chosen.save(model, tmp_path)
    assert torch.equal(logits(chosen.load(base(tiny_model, kind), tmp_path)), expected)

    def dense() -> Any:
        return dequantize_model(base(tiny_model, kind), torch.float32)

    assert is_close(logits(peft.PeftModel.from_pretrained(dense(), tmp_path).eval()), expected)
    assert is_close(logits(merged(chosen, dense(), tmp_path)), expected)


@pytest.mark.parametrize("name", METHODS)
def test_load_refuses_adapter_of_another_base(tiny_model: Path, tmp_path: Path, name: str):
    chosen = method(name)
    chosen.save(chosen.attach(load(tiny_model), 1), tmp_path)
    write_tiny_model(tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(RefusedError):
        chosen.load(load(tmp_path / "deeper"), tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_unknown_target_modules_error_lists_layers(tiny_model: Path, name: str):
    with pytest.raises(UnsupportedError, match="no layer of the model matches"):
        method(name, target_modules=["queries"], **({"feedforward_modules": []} if name == "ia3" else {})).attach(
            load(tiny_model), 1
        )


def test_oft_refuses_block_size_that_does_not_divide(tiny_model: Path):
    with pytest.raises(UnsupportedError, match="has 64 inputs, not a multiple"):
        method("oft", block_size=12).attach(load(tiny_model), 1)

"""Detaching an adapter restores the base bitwise, for every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from finetune.adapters.base import trainable
from finetune.errors import UnsupportedError
from finetune.recipe.sections.adapter import Adapter
from finetune.resolve import build
from tests.fixtures.tiny import tiny_tokenizer
from tests.integration.test_methods import METHODS
from tests.unit.quantizers.loading import PACKED, load, logits

ON = [(name, None) for name in METHODS if METHODS[name]["method"] != "full"]
ON += [("lora", "nf4"), ("lora-dora", "affine-3"), ("vera", "nf4"), ("oft", "affine-3"), ("prefix_tuning", "nf4")]


def base(folder: Path, kind: str | None) -> Any:
    return load(folder, PACKED[kind]) if kind else load(folder)


def method(name: str) -> Any:
    return build(TypeAdapter(Adapter).validate_python(METHODS[name]), [], tiny_tokenizer())


def saved(name: str, model: Any, folder: Path) -> None:
    """Save weights that change the logits, as after training."""
    torch.manual_seed(0)
    chosen = method(name)
    attached = chosen.attach(model, 10)
    with torch.no_grad():
        for parameter in trainable(attached).values():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    chosen.save(attached, folder)


@pytest.mark.parametrize(("name", "kind"), ON)
def test_detach_restores_base_bitwise_for_next_adapter(tiny_model: Path, tmp_path: Path, name: str, kind: str | None):
    saved(name, base(tiny_model, kind), tmp_path)
    chosen, model = method(name), base(tiny_model, kind)
    plain, tensors = logits(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tuned = logits(chosen.load(base(tiny_model, kind), tmp_path))
    assert not torch.equal(tuned, plain)
    for _ in range(2):
        attached = chosen.load(model, tmp_path)
        assert torch.equal(logits(attached), tuned)
        model = chosen.detach(attached)
        assert torch.equal(logits(model), plain)
        after = model.state_dict()
        assert after.keys() == tensors.keys()
        assert all(torch.equal(after[key], tensor) for key, tensor in tensors.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_detach_of_full_fine_tuning_is_refused(tiny_model: Path):
    chosen = method("full")
    with pytest.raises(UnsupportedError, match="no adapter"):
        chosen.detach(chosen.attach(load(tiny_model), 1))

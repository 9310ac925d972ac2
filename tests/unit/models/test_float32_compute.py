"""16-bit weights that compute in float32: the reference is the model in float32 with the rounded weights."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers import Gemma2Config, GPT2Config, LlamaConfig, PreTrainedModel, Qwen3MoeConfig

from finetune.adapters.base import trainable
from finetune.data.collate import padded
from finetune.data.encode import Example
from finetune.models.kernels.float32_compute import compute_in_float32
from finetune.models.kernels.fused import fuse
from finetune.models.loading.load import load_model
from finetune.models.loading.model_files import ModelFolder
from finetune.quantizers.choice import Quantizers
from finetune.recipe.sections.adapter import Adapter
from finetune.recipe.sections.model import Model
from finetune.resolve import build
from finetune.train.loss import summed_cross_entropy
from tests.fixtures.tiny import SIZES, random_model, tiny_tokenizer
from tests.unit.quantizers.loading import PACKED, PLAIN

ROWS = [Example(list(range(start, start + 12)), [place > 3 for place in range(12)]) for start in (3, 90)]

FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, attention_bias=True),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "scaled embeddings": Gemma2Config(**SIZES),
    "gpt2": GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "experts": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
}

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "r": 4},
    "dora": {"method": "lora", "r": 4, "dora": True},
    "head": {"method": "lora", "r": 4, "modules_to_save": ["lm_head"]},
    "vera": {"method": "vera", "r": 8},
    "oft": {"method": "oft", "block_size": 8},
    "ia3": {"method": "ia3"},
    "prompt": {"method": "prompt_tuning", "tokens": 4},
    "prefix": {"method": "prefix_tuning", "tokens": 4, "projection": None},
}


def pair(family: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model with 16-bit weights that computes in float32, and one with the same values in float32."""
    stored = random_model(FAMILIES[family]).to(dtype).requires_grad_(False)
    wide = deepcopy(stored).float()
    compute_in_float32(stored)
    return stored, wide


def results(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    loss = summed_cross_entropy(model.train(), padded(ROWS, padding=0))
    loss.backward()
    return loss.detach(), {
        name: parameter.grad for name, parameter in trainable(model).items() if parameter.grad is not None
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_float32_weights(family: str, dtype: torch.dtype):
    stored, wide = pair(family, dtype)
    control = deepcopy(wide).to(dtype)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        found, expected = stored(input_ids=ids).logits, wide(input_ids=ids).logits
        assert found.dtype is torch.float32
        assert (found - expected).norm() <= 1e-5 * expected.norm()
        # The control: computed in the type of the weights, logits differ.
        assert (control(input_ids=ids).logits.float() - expected).norm() > 1e-4 * expected.norm()
    assert stored.get_input_embeddings().weight.dtype is dtype


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loss_and_gradients_equal_those_of_float32_weights(family: str, name: str):
    if (family, name) in {("gpt2", "oft"), ("gpt2", "vera"), ("gpt2", "ia3"), ("gpt2", "head")}:
        pytest.skip("the method has no such layers, or the head is tied")
    models = []
    for model in pair(family, torch.bfloat16):
        fuse(model)
        torch.manual_seed(0)
        method = build(TypeAdapter(Adapter).validate_python(METHODS[name]), (), tiny_tokenizer())
        models.append(method.attach(model, 1))
    models[1].load_state_dict(models[0].state_dict())  # PEFT draws initial values in the type of the base
    (loss, gradients), (expected, others) = map(results, models)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert gradients.keys() == others.keys()
    tolerance = 1e-2 if name == "full" else 1e-4  # gradients of 16-bit weights have 16 bits
    for key, gradient in gradients.items():
        assert (gradient - others[key]).norm() <= tolerance * others[key].norm() + 1e-9, key


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_loaded_model_computes_in_float32_where_the_recipe_says_so(tiny_model: Path, kind: str):
    def loaded(weights: torch.dtype, computes: torch.dtype) -> Tensor:
        model = load_model(
            ModelFolder(tiny_model, "base"),
            Model(name=str(tiny_model)),
            Quantizers(PACKED.get(kind, PLAIN)),
            weight_dtype=weights,
            compute_dtype=computes,
            device=torch.device("cpu"),
        )
        assert model.get_input_embeddings().weight.dtype is weights
        with torch.no_grad():
            return model(input_ids=torch.arange(20)[None]).logits

    found = loaded(torch.bfloat16, torch.float32)
    assert found.dtype is torch.float32
    assert not torch.equal(found, found.bfloat16().float())
    if kind == "plain":
        # The weights are rounded once: far nearer to float32 than a model that computes in bfloat16.
        exact, narrow = loaded(torch.float32, torch.float32), loaded(torch.bfloat16, torch.bfloat16).float()
        assert (found - exact).norm() < 0.7 * (narrow - exact).norm()

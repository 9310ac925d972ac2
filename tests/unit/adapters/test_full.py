"""Full fine-tuning: selection of trainable weights, saving, loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from finetune.adapters.full import FullMethod
from finetune.errors import ModelError, RefusedError, UnsupportedError
from finetune.recipe.sections.adapter import Full
from tests.fixtures.tiny import tiny_llama

METHOD = FullMethod(Full(method="full"))
IDS = torch.tensor([[256, 5, 9, 80, 41]])


@pytest.mark.parametrize(
    ("section", "trains"),
    [
        ({"train": ["*.layers.1.*"]}, ["model.layers.1."]),
        ({"freeze": ["*.layers.*", "lm_head*"]}, ["model.embed_tokens.", "model.norm."]),
        ({"train": ["*.bias"]}, ["q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias"]),
    ],
)
def test_attach_unfreezes_selected_weights_only(section: dict[str, list[str]], trains: list[str]):
    model = tiny_llama(attention_bias=True, tie_word_embeddings=False)
    FullMethod(Full(method="full", **section)).attach(model, 1)
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert training == {name for name, _ in model.named_parameters() if any(part in name for part in trains)}
    assert training


@pytest.mark.parametrize("section", [{"train": ["*.bias"]}, {"freeze": ["*.queries.*"]}, {"freeze": ["*"]}])
def test_attach_refuses_patterns_without_match(section: dict[str, list[str]]):
    with pytest.raises(UnsupportedError):
        FullMethod(Full(method="full", **section)).attach(tiny_llama(), 1)


def test_attach_unfreezes_all_weights_by_default():
    model = tiny_llama().requires_grad_(False)
    assert all(p.requires_grad for p in METHOD.attach(model, 1).parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_loads_in_transformers_and_by_load(tmp_path: Path, tied: bool):
    model = tiny_llama(seed=1, tie_word_embeddings=tied).eval()
    METHOD.save(model, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again = METHOD.load(tiny_llama(seed=2, tie_word_embeddings=tied), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, model(IDS).logits)
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied


def test_load_refuses_weights_of_another_shape(tmp_path: Path):
    METHOD.save(tiny_llama(), tmp_path)
    with pytest.raises(RefusedError):
        METHOD.load(tiny_llama(num_hidden_layers=1), tmp_path)


def test_saved_experts_load_from_the_names_of_their_files(tmp_path: Path):
    """The files have a tensor for each expert, the model one for all."""
    config = Qwen3MoeConfig(
        vocab_size=320, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(AutoModelForCausalLM.from_config(config).float().eval())
    METHOD.save(models[0], tmp_path)
    assert any("experts.3." in name for name in load_file(tmp_path / "model.safetensors"))
    again = METHOD.load(models[1], tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, models[0](IDS).logits)


def test_load_refuses_damaged_weights(tmp_path: Path):
    METHOD.save(tiny_llama(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(RefusedError, match="damaged") as caught:
        METHOD.load(tiny_llama(), tmp_path)
    assert caught.value.where == str(file)


def test_load_names_missing_weights(tmp_path: Path):
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        METHOD.load(tiny_llama(), tmp_path)

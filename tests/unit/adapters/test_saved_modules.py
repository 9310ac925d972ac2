"""Modules that train in full: those that the recipe names and no others, tied ones as one, and adapters of earlier
versions, which chose them by PEFT's own rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, PreTrainedModel

from finetune.adapters.base import AdapterMethod
from finetune.recipe.sections.adapter import Lora
from finetune.resolve import build
from tests.fixtures.tiny import random_model, tiny_llama

IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(1))


def gpt2(**changes: Any) -> PreTrainedModel:
    return random_model(GPT2Config(vocab_size=320, n_positions=64, n_embd=64, n_layer=2, n_head=4, **changes)).eval()


def method(targets: list[str], saved: list[str]) -> AdapterMethod:
    chosen: AdapterMethod = build(Lora(method="lora", r=4, target_modules=targets, modules_to_save=saved))
    return chosen


def wrapped(model: nn.Module) -> set[str]:
    names = {name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    return {name.removeprefix("base_model.model.") for name in names}


def disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.1)


@pytest.mark.parametrize(
    ("saved", "names"),
    [
        (["norm"], {"model.norm"}),
        (["input_layernorm"], {"model.layers.0.input_layernorm", "model.layers.1.input_layernorm"}),
        (["1.mlp"], {"model.layers.1.mlp"}),
        (["lm_head"], {"lm_head"}),
    ],
)
def test_only_named_modules_train_in_full(saved: list[str], names: set[str]):
    """PEFT's own rule is an ending anywhere: its `norm` is `input_layernorm` as well."""
    attached = method(["q_proj"], saved).attach(tiny_llama(tie_word_embeddings=False), 1)
    assert wrapped(attached) == names


@pytest.mark.parametrize("saved", [["lm_head"], ["wte"], ["wte", "lm_head"]], ids="+".join)
def test_tied_pair_trains_as_one_under_either_name(saved: list[str], tmp_path: Path):
    base = gpt2()
    chosen = method(["c_attn"], saved)
    attached = chosen.attach(base, 1)
    assert wrapped(attached) == {"transformer.wte", "lm_head"}
    assert base.lm_head.weight is base.transformer.wte.weight
    disturb(attached)
    expected = attached(IDS).logits
    chosen.save(attached, tmp_path)
    assert torch.equal(chosen.load(gpt2(), tmp_path)(IDS).logits, expected)
    assert torch.equal(PeftModel.from_pretrained(gpt2(), tmp_path)(IDS).logits, expected)


@pytest.mark.parametrize(
    ("make", "targets", "saved"),
    [
        (tiny_llama, ["q_proj"], ["norm"]),
        (tiny_llama, ["q_proj"], ["embed_tokens"]),
        (tiny_llama, ["q_proj"], ["lm_head"]),
        (gpt2, ["c_attn"], ["wte"]),
        (gpt2, ["c_attn"], ["ln_f", "proj"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_adapter_of_an_earlier_version_is_read_as_stock_peft_reads_it(
    make: Any, targets: list[str], saved: list[str], tmp_path: Path
):
    earlier = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=32,
        target_modules=list(targets),
        modules_to_save=list(saved),
        ensure_weight_tying=True,
    )
    model = get_peft_model(make().eval(), earlier)
    disturb(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    expected = model(IDS).logits
    assert torch.allclose(method(targets, saved).load(make().eval(), tmp_path)(IDS).logits, expected, atol=1e-5)


@pytest.mark.parametrize("targets", [["lm_head"], ["wte"], ["lm_head", "wte"]], ids="+".join)
@pytest.mark.parametrize("dora", [False, True])
def test_layers_of_a_tied_pair_are_adapted_by_themselves(targets: list[str], dora: bool, tmp_path: Path):
    chosen: AdapterMethod = build(Lora(method="lora", r=4, target_modules=targets, dora=dora))
    attached = chosen.attach(gpt2(), 1)
    disturb(attached)
    chosen.save(attached, tmp_path)
    expected = attached(IDS).logits
    layers = {name.partition(".lora_")[0] for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert {name.rpartition(".")[2] for name in layers} == set(targets)
    assert torch.allclose(chosen.load(gpt2(), tmp_path)(IDS).logits, expected, atol=1e-5)
    assert torch.allclose(PeftModel.from_pretrained(gpt2(), tmp_path).eval()(IDS).logits, expected, atol=1e-4)

"""Trained rows of an output head, beside a float64 computation with the whole matrix."""

from __future__ import annotations

import pytest
import torch
from peft import TrainableTokensConfig, get_peft_model
from torch import nn
from transformers import GPTJConfig

from finetune.adapters.token_rows import HeadRows, own_head, token_modules, use_head_rows
from tests.fixtures.tiny import random_model, tiny_llama

IDS = [300, 7, 41]


def head_of(bias: bool) -> HeadRows:
    torch.manual_seed(0)
    config = GPTJConfig(vocab_size=320, n_positions=32, n_embd=32, n_layer=1, n_head=2, rotary_dim=8)
    model = random_model(config) if bias else tiny_llama(tie_word_embeddings=False)
    head = model.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias)
    names = token_modules(model)
    wrapped = get_peft_model(
        model, TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=IDS, target_modules=names)
    )
    use_head_rows(wrapped)
    found = wrapped.get_base_model().get_output_embeddings()
    assert isinstance(found, HeadRows)
    nn.init.normal_(found.trainable_tokens_delta["default"])
    return found


@pytest.mark.parametrize("bias", [True, False])
def test_head_rows_are_the_head_with_these_rows(bias: bool):
    head = head_of(bias)
    rows = head.trainable_tokens_delta["default"]
    base = head.base_layer
    x = torch.randn(2, 5, base.in_features, requires_grad=True)
    weight = base.weight.detach().double().clone()
    own = rows.detach().double().requires_grad_()
    wide = x.detach().double().requires_grad_()
    whole = weight.index_copy(0, torch.tensor(IDS), own)
    expected = wide @ whole.T + (base.bias.detach().double() if bias else 0)
    found = head(x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    probe = torch.randn_like(found)
    (found * probe).sum().backward()
    (expected * probe.double()).sum().backward()
    torch.testing.assert_close(rows.grad.double(), own.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_merged_head_is_the_same(bias: bool):
    head = head_of(bias)
    x = torch.randn(3, head.base_layer.in_features)
    before = head(x)
    head.merge()
    torch.testing.assert_close(head(x), before)


def test_token_modules_of_tied_models_are_the_embeddings():
    assert token_modules(tiny_llama()) == ["model.embed_tokens"]
    untied = tiny_llama(tie_word_embeddings=False)
    assert own_head(tiny_llama()) is None
    assert token_modules(untied) == ["model.embed_tokens", "lm_head"]
    assert token_modules(untied, adapted=["lm_head"]) == ["model.embed_tokens"]

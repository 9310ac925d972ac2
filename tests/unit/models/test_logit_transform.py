"""What a model does between its head and its logits is found from its own forward pass; the reference is float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma4Config,
    GraniteConfig,
    NanoChatConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
    xLSTMConfig,
)

from finetune.data.collate import padded
from finetune.data.encode import Example
from finetune.models.kernels.logit_transform import LogitTransform, find_logit_transform
from finetune.train import loss as loss_module
from finetune.train.loss import summed_cross_entropy, visit_log_probs
from tests.fixtures.tiny import SIZES, random_model, tiny_llama

ROWS = [
    Example(list(range(start, start + length)), [place % 3 > 0 for place in range(length)])
    for start, length in ((3, 9), (40, 5), (90, 14))
]
WITHOUT_HEAD_DIM = {key: value for key, value in SIZES.items() if key != "head_dim"}
HYBRID = {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}

FAMILIES: dict[str, Callable[[], Any]] = {
    "gemma2": lambda: Gemma2Config(**SIZES, final_logit_softcapping=9.0),
    "gemma3n": lambda: Gemma3nTextConfig(
        **SIZES | HYBRID,
        final_logit_softcapping=9.0,
        vocab_size_per_layer_input=320,
        hidden_size_per_layer_input=16,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    "gemma4 in text_config": lambda: Gemma4Config(
        text_config=SIZES
        | HYBRID
        | {
            "final_logit_softcapping": 9.0,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 320,
            "global_head_dim": 16,
        },
        vision_config=None,
        audio_config=None,
    ),
    "recurrent_gemma": lambda: RecurrentGemmaConfig(
        **WITHOUT_HEAD_DIM, lru_width=64, logits_soft_cap=9.0, block_types=["recurrent", "attention"]
    ),
    "xlstm": lambda: xLSTMConfig(
        vocab_size=320, hidden_size=64, num_heads=2, num_hidden_layers=2, output_logit_soft_cap=9.0, chunk_size=16
    ),
    "nanochat": lambda: NanoChatConfig(**WITHOUT_HEAD_DIM, final_logit_softcapping=9.0),
    "falcon_h1": lambda: FalconH1Config(
        **SIZES, lm_head_multiplier=0.3, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16
    ),
    "cohere": lambda: CohereConfig(**WITHOUT_HEAD_DIM, logit_scale=0.3),
    "granite": lambda: GraniteConfig(**WITHOUT_HEAD_DIM, logits_scaling=3.0),
}


def model_of(family: str) -> PreTrainedModel:
    """A random model with logits of the size of its cap."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).float().eval().requires_grad_(False)
    model.get_output_embeddings().weight.mul_(12)
    return model.requires_grad_(True)


def reference_loss(model: PreTrainedModel) -> Tensor:
    """Summed cross-entropy in float64 of the logits that transformers returns."""
    batch = padded(ROWS, padding=0)
    logits_BTV = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False).logits.double()
    labels = batch.labels_BT[:, 1:].flatten()
    return functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels, reduction="sum")


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_loss_equals_cross_entropy_of_the_models_own_logits(family: str):
    model = model_of(family)
    expected = reference_loss(model)
    expected.backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    found = summed_cross_entropy(model, padded(ROWS, padding=0))
    found.backward()
    transform = loss_module._transforms[model.get_output_embeddings()]
    assert transform is not None
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in gradients.items():
        assert (model.get_parameter(name).grad - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
    # The control: without the transform, the loss is another.
    plain = loss_module.chunked_cross_entropy(model, padded(ROWS, padding=0), LogitTransform())
    assert abs(plain.item() / expected.item() - 1) > 1e-4


@pytest.mark.parametrize("family", ["recurrent_gemma", "xlstm", "gemma4 in text_config"])
def test_log_probs_equal_those_of_the_models_own_logits(family: str):
    model, batch = model_of(family), padded(ROWS[:1], padding=0)
    found: list[Tensor] = []
    visit_log_probs(model, batch, lambda log_probs_NV, labels_N: found.append(log_probs_NV))
    with torch.no_grad():
        own = model(input_ids=batch.ids_BT, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    is_target = batch.labels_BT[0, 1:] >= 0
    assert torch.allclose(torch.cat(found).double(), own[is_target], atol=1e-4)


def _changed(change: Callable[[Tensor], Tensor], **config: Any) -> PreTrainedModel:
    """A model with a further operation on its logits."""
    model = tiny_llama(**config)

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        output.logits = change(output.logits)

    model.register_forward_hook(hook)
    return model


def transform_of(model: PreTrainedModel) -> LogitTransform | None:
    ids = torch.arange(8)[None]
    return find_logit_transform(model.get_output_embeddings(), lambda: model(input_ids=ids).logits)


KNOWN: dict[str, tuple[Callable[[Tensor], Tensor], LogitTransform]] = {
    "none": (lambda x: x, LogitTransform()),
    "scaled": (lambda x: x * -0.7, LogitTransform(-0.7)),
    "capped": (lambda x: 5 * torch.tanh(x / 5), LogitTransform(1.0, 5.0)),
    "scaled, then capped": (lambda x: 5 * torch.tanh(0.4 * x / 5), LogitTransform(0.4, 5.0)),
    "capped, then scaled": (lambda x: 3 * 5 * torch.tanh(x / 5), LogitTransform(3.0, 15.0)),
    "a cap in float32 alone": (lambda x: 5 * torch.tanh(x.float() / 5), LogitTransform(1.0, 5.0)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_transform_is_found_from_the_forward_pass(name: str):
    change, expected = KNOWN[name]
    found = transform_of(_changed(change))
    assert found is not None
    assert found.factor == pytest.approx(expected.factor, rel=1e-5)
    assert found.cap == (None if expected.cap is None else pytest.approx(expected.cap, rel=1e-6))


@pytest.mark.parametrize("name", KNOWN)
def test_transform_of_a_bfloat16_model_equals_its_own_logits(name: str):
    change, _ = KNOWN[name]
    model = _changed(change).to(torch.bfloat16)
    transform = transform_of(model)
    assert transform is not None
    ids = torch.arange(8)[None]
    outputs: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda head, inputs, output: outputs.append(output))
    with torch.no_grad():
        own = model(input_ids=ids).logits
    handle.remove()
    assert torch.allclose(transform(outputs[0]).float(), own.float(), rtol=2e-2)
    if name == "a cap in float32 alone":
        assert torch.equal(transform(outputs[0]), own)


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted": lambda x: x + 1,
    "another cap": lambda x: 5 * x / (5 + x.abs()),
    "clipped": lambda x: x.clamp(-3, 3),
    "masked in place": lambda x: x.index_fill_(-1, torch.tensor([7]), -1e9),
    "scaled by token": lambda x: x * torch.linspace(1, 1.01, x.shape[-1]),
    "scaled by position": lambda x: x * torch.linspace(1, 1.01, x.shape[1])[:, None],
    "cut": lambda x: x[..., :-4],
    "nearly capped": lambda x: 5 * torch.tanh(x / 5) + 1e-3 * x,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_operation_is_not_taken_for_a_known_one(name: str):
    assert transform_of(_changed(UNKNOWN[name])) is None


@pytest.mark.parametrize(
    "name", sorted(UNKNOWN.keys() - {"scaled by position"})
)  # of kept positions, another each time
def test_loss_under_an_unknown_operation_is_that_of_the_models_own_logits(name: str):
    model = _changed(UNKNOWN[name])
    expected = reference_loss(model).item()
    assert summed_cross_entropy(model, padded(ROWS, padding=0)).item() == pytest.approx(expected, rel=1e-6)


def test_config_in_a_section_of_text_is_read_for_estimates():
    assert LogitTransform.expected(FAMILIES["gemma4 in text_config"]()).cap == 9.0
    assert LogitTransform.expected(FAMILIES["recurrent_gemma"]()).cap == 9.0
    assert LogitTransform.expected(FAMILIES["xlstm"]()).cap == 9.0
    assert LogitTransform.expected(tiny_llama().config).cap is None


def test_head_keeps_its_own_forward_pass():
    model = random_model(Gemma2Config(**SIZES))
    head = model.get_output_embeddings()
    own = head.forward
    transform_of(model)
    assert "forward" not in vars(head)
    head.forward = own  # as hooks of accelerate put it
    transform_of(model)
    assert head.forward is own

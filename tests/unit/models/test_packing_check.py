"""Packed examples do not see each other, or packing is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, GPT2Config, MistralConfig, PretrainedConfig, Qwen3Config

from finetune.data.collate import flattened, padded
from finetune.data.encode import Example
from finetune.errors import UnsupportedError
from finetune.models.kernels import packed_attention
from finetune.models.kernels.packing_check import (
    causal_table,
    check_no_cross_contamination,
    cross_contamination,
    prefix_sharing_blocker,
    supports_prefix_sharing,
    takes_packed_attention,
    use_packing_attention,
)
from finetune.train.loss import summed_cross_entropy
from tests.fixtures.tiny import SIZES, random_model, tiny_llama

ROWS = [Example(list(range(start, start + length)), [True] * length) for start, length in ((3, 9), (40, 5), (90, 14))]


SMALL_GPT2 = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}


def model_with(attention: str, **changes: object) -> nn.Module:
    model = tiny_llama(**changes)
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cross_contamination_is_zero_with_own_kernels(attention: str):
    assert cross_contamination(model_with(attention)) <= 1e-6
    check_no_cross_contamination(model_with(attention))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_flattened_rows_match_padded_rows_in_loss_and_gradients(attention: str):
    results = []
    for batch in (padded(ROWS, padding=0), flattened(ROWS)):
        model = model_with(attention)
        loss = summed_cross_entropy(model, batch)
        loss.backward()
        results.append((loss.item(), [p.grad for p in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(results[0][1], results[1][1], strict=True))


PREFIX = [9, 8, 7, 6, 5, 4, 3]
BRANCHES = [
    Example([*PREFIX[:shared], *range(start, start + own)], [False] * (shared + 3) + [True] * (own - 3))
    for shared, start, own in ((7, 40, 9), (5, 60, 6), (7, 80, 14), (0, 100, 5))
]
"""Rows with a shared prefix; targets start at the fourth token behind it."""


@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 1}, {"num_key_value_heads": 4, "num_hidden_layers": 3}], ids=str
)
def test_shared_prefix_rows_match_padded_rows_in_loss_and_gradients(changes: dict[str, int]):
    results = []
    for batch in (padded(BRANCHES, padding=0), flattened(BRANCHES, shares_prefixes=True)):
        model = tiny_llama(**changes)
        use_packing_attention(model, may_choose=True)
        assert prefix_sharing_blocker(model) is None
        loss = summed_cross_entropy(model, batch)
        loss.backward()
        results.append((loss.item(), [p.grad for p in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("model_type", [MistralConfig, Qwen3Config, Gemma2Config], ids=lambda kind: kind.model_type)
def test_shared_prefix_matches_padded_rows_with_sliding_windows_or_is_off(model_type: type):
    model = random_model(model_type(**SIZES, sliding_window=6))
    use_packing_attention(model, may_choose=True)
    may_share = prefix_sharing_blocker(model) is None
    assert may_share == (model_type is not Gemma2Config)  # its kernel is its own, since its scores have a soft cap
    losses = [
        summed_cross_entropy(model, batch).item()
        for batch in (padded(BRANCHES, padding=0), flattened(BRANCHES, shares_prefixes=may_share))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_prefix_sharing_off_without_the_packed_kernel():
    model = tiny_llama()
    use_packing_attention(model, may_choose=False)
    assert "its attention" in str(prefix_sharing_blocker(model))


@pytest.mark.parametrize("drop", [{"resid_pdrop": 0.1}, {"embd_pdrop": 0.1}], ids=str)
def test_prefix_sharing_off_with_dropout(drop: dict[str, float]):
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}
    shares = []
    for settings in (none, none | drop):
        model = random_model(GPT2Config(**SMALL_GPT2, **settings))
        use_packing_attention(model, may_choose=True)
        shares.append(prefix_sharing_blocker(model) is None)
    assert shares == [True, False]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MistralConfig(**SIZES), (True, True)),
        (Gemma2Config(**SIZES), (False, False)),
        (GPT2Config(**SMALL_GPT2, attn_pdrop=0.1), (False, False)),
        (GPT2Config(**SMALL_GPT2, attn_pdrop=0.0, resid_pdrop=0.1), (True, False)),
    ],
    ids=["usual", "no sdpa", "attention drops", "blocks drop"],
)
def test_config_predicts_the_kernel_and_prefix_sharing(config: PretrainedConfig, expected: tuple[bool, bool]):
    assert (takes_packed_attention(config), supports_prefix_sharing(config)) == expected
    model = random_model(config)
    use_packing_attention(model, may_choose=True)
    is_ours = model.config._attn_implementation == packed_attention.NAME
    assert (is_ours, prefix_sharing_blocker(model) is None) == expected


def test_model_with_attention_dropout_keeps_its_own_kernel():
    """The packed kernel would refuse the first training step."""
    model = random_model(GPT2Config(**SMALL_GPT2, attn_pdrop=0.1))
    use_packing_attention(model, may_choose=True)
    assert model.config._attn_implementation == "sdpa"
    summed_cross_entropy(model.train(), flattened(ROWS)).backward()


def test_prefix_sharing_off_if_logits_differ(monkeypatch: pytest.MonkeyPatch):
    """The control: a kernel that ignores the prefix lengths."""
    model = tiny_llama()
    use_packing_attention(model, may_choose=True)
    example_bounds = packed_attention.example_bounds

    def without_prefixes(positions_BT: torch.Tensor) -> torch.Tensor:
        bounds = example_bounds(positions_BT)
        bounds[:, :, 1] = 0
        return bounds

    monkeypatch.setattr(packed_attention, "example_bounds", without_prefixes)
    assert "its logits differ" in str(prefix_sharing_blocker(model))


def test_cross_contaminating_model_is_refused(monkeypatch: pytest.MonkeyPatch):
    """The control: the same model without the restarting positions."""
    model = tiny_llama()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda position_ids=None, **inputs: forward(**inputs))
    assert cross_contamination(model) > 1e-3
    with pytest.raises(UnsupportedError, match="see each other"):
        check_no_cross_contamination(model)


def test_causal_table_is_the_side_of_square_boolean_buffers():
    model = nn.Module()
    assert causal_table(model) is None
    model.register_buffer("bias", torch.tril(torch.ones(48, 48, dtype=torch.bool))[None, None])
    model.register_buffer("frequencies", torch.ones(32, 32))
    model.register_buffer("mask", torch.ones(16, 24, dtype=torch.bool))
    assert causal_table(model) == 48
    assert causal_table(tiny_llama()) is None

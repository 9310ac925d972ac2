"""Agreement of two models: zero difference of equal models, hand-computed values of others."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest
import torch
from torch.nn.functional import kl_div

from finetune.data.encode import Example
from finetune.evaluation.agreement import agreement, logits_of
from tests.fixtures.tiny import tiny_llama

ROWS = [Example([5, 6, 7], [False, True, True]), Example([8, 9, 10, 11, 12], [True] * 5)]


def random_logits(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 50, generator=generator) for count in (3, 5)]


def test_agreement_of_a_model_with_itself_is_complete():
    logits = logits_of(tiny_llama(), ROWS)
    found = agreement(logits, logits_of(tiny_llama(), ROWS))
    largest = max(float(row.abs().max()) for row in logits)
    assert astuple(found) == (2, 8, 0.0, largest, 0.0, 1.0)
    assert found.relative_difference == 0


def test_agreement_of_two_positions_equals_hand_computed_values():
    reference = [torch.tensor([[math.log(3), 0.0], [0.0, -2.0]])]
    other = [torch.tensor([[0.0, math.log(3)], [0.0, -2.0]])]
    found = agreement(reference, other)
    assert found.top1_agreement == 0.5
    assert found.largest_difference == pytest.approx(math.log(3))
    assert found.largest_logit == 2
    assert found.relative_difference == pytest.approx(math.log(3) / 2)
    # At the first position p = (3/4, 1/4) and q = (1/4, 3/4); the second is the same in both.
    assert found.kl_divergence == pytest.approx((0.75 * math.log(3) - 0.25 * math.log(3)) / 2)


def test_kl_divergence_equals_torch_kl_div_per_position():
    reference, other = random_logits(1), random_logits(2)
    log_p, log_q = torch.cat(reference).log_softmax(-1), torch.cat(other).log_softmax(-1)
    expected = kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    assert agreement(reference, other).kl_divergence == pytest.approx(float(expected), rel=1e-5)


def test_constant_added_to_logits_changes_no_probability():
    reference = random_logits(1)
    found = agreement(reference, [row + 3 for row in reference])
    assert found.largest_difference == pytest.approx(3, rel=1e-5)
    assert found.kl_divergence == pytest.approx(0, abs=1e-9)
    assert found.top1_agreement == 1


def test_largest_difference_finds_a_single_wrong_logit():
    reference, other = random_logits(1), random_logits(1)
    other[1][4, 49] += 100
    assert agreement(reference, other).largest_difference == pytest.approx(100, rel=1e-4)


def test_agreement_with_nan_logits_is_nan():
    reference, other = random_logits(1), random_logits(1)
    other[0][0, 0] = math.nan
    assert math.isnan(agreement(reference, other).relative_difference)


def test_logits_are_float32_on_the_cpu_without_dropout_or_gradient():
    model = tiny_llama(attention_dropout=0.5).bfloat16().train()
    first, second = logits_of(model, ROWS), logits_of(model, ROWS)
    assert [tuple(row.shape) for row in first] == [(3, 320), (5, 320)]
    assert all(row.dtype is torch.float32 and row.device.type == "cpu" and not row.requires_grad for row in first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

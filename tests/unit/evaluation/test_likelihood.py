"""Likelihoods of tokens do not depend on the batch."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator

from finetune.data.collate import padded
from finetune.data.encode import Example
from finetune.evaluation import likelihood
from finetune.evaluation.likelihood import Likelihood, likelihoods
from finetune.evaluation.loss import compute_validation_loss
from finetune.models.kernels.packing_check import prefix_sharing_blocker, use_packing_attention
from tests.fixtures.tiny import tiny_llama

ROWS = [
    Example([256, 5, 6, 7, 8], [False, False, False, True, True]),
    Example([256, 5, 6, 7, 9], [False, False, False, True, True]),  # differs from the first in its last token
    Example([256, 5, 6, 7, 8], [False, False, True, True, True]),
    Example([256, 80, 81, 82, 83, 84, 85, 86], [True] * 8),
    Example([256, 80, 81, 90], [False, True, False, True]),
    Example([256, 80, 81, 91], [False, True, True, False]),
    Example([256, 80, 81, 92], [False, True, True, False]),  # no group: the last token is no target
]


def found(rows: list[Example], model: Any = None, **options: Any) -> list[Likelihood]:
    results: dict[int, Likelihood] = {}
    settings: dict[str, Any] = {"compute_dtype": torch.float32, "batch_size": 4, "padding": 0}
    settings |= {"may_share": lambda: False} | options
    likelihoods(model or tiny_llama(), rows, on_batch=results.update, **settings)
    return [results[number] for number in range(len(rows))]


@pytest.fixture(autouse=True)
def _few_tokens_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "WORTH_SHARING", 1)


def sharing() -> dict[str, Any]:
    """Options for a model with prefix sharing."""
    model = tiny_llama()
    use_packing_attention(model, may_choose=True)
    return {"model": model, "may_share": lambda: prefix_sharing_blocker(model) is None}


def pass_shapes(model: Any) -> list[tuple[int, ...]]:
    """Rows and tokens of each pass; the list grows with every pass."""
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def by_hand(row: Example) -> Likelihood:
    with torch.no_grad():
        log_probs = tiny_llama()(torch.tensor([row.ids])).logits[0].log_softmax(-1)
    targets = [index for index in range(1, len(row.ids)) if row.is_target[index]]
    log_prob = sum(float(log_probs[index - 1, row.ids[index]]) for index in targets)
    is_greedy = all(int(log_probs[index - 1].argmax()) == row.ids[index] for index in targets)
    return Likelihood(log_prob, len(targets), is_greedy)


@pytest.mark.parametrize("options", [dict, sharing])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_likelihoods_in_batches_equal_those_of_single_rows(batch_size: int, options: Any):
    for got, expected in zip(found(ROWS, batch_size=batch_size, **options()), map(by_hand, ROWS), strict=True):
        assert got.log_prob == pytest.approx(expected.log_prob, abs=1e-4)
        assert (got.tokens, got.is_greedy) == (expected.tokens, expected.is_greedy)


def test_only_the_top1_last_token_is_greedy():
    with torch.no_grad():
        best = int(tiny_llama()(torch.tensor([[256, 5, 6, 7]])).logits[0, -1].argmax())
    rows = [Example([256, 5, 6, 7, end], [False] * 4 + [True]) for end in (1, best, 2)]
    assert [each.is_greedy for each in found(rows)] == [False, True, False]


def test_rows_that_differ_in_the_last_token_are_one_row_of_the_pass():
    model = tiny_llama()
    shapes = pass_shapes(model)
    rows = [Example([256, 5, 6, 7, end], [False] * 4 + [True]) for end in range(60, 64)]
    found(rows, model)
    assert shapes[-1] == (1, 4)  # the last token is not read either


def test_shared_question_of_answers_is_computed_once():
    question, answers = [256, *range(20, 49)], [[60, 61], [62, 63, 64], [60, 65], [66] * 4]
    rows = [
        Example(question + answer, [False] * len(question) + [True] * len(answer))
        for answer in answers
    ]  # fmt: skip
    options = sharing()
    shapes = pass_shapes(options["model"])
    for got, expected in zip(found(rows, **options), map(by_hand, rows), strict=True):
        assert got.log_prob == pytest.approx(expected.log_prob, abs=1e-4)
    # 29 shared tokens, then the last token of the question and each answer without its last token. The first and third
    # answer differ in their last token only: they are one row.
    assert shapes[-1] == (1, 29 + (1 + 1) + (1 + 2) + (1 + 3))


def test_prefix_sharing_is_not_tried_without_a_shared_prefix():
    may_share = Mock(return_value=True)
    found(ROWS[3:5], may_share=may_share)
    assert not may_share.called
    found(ROWS, may_share=may_share, model=sharing()["model"])
    assert may_share.called


def test_sum_of_likelihoods_equals_the_validation_loss():
    total = found(ROWS)
    settings = {"compute_dtype": torch.float32, "batch_size": 4, "make_batch": partial(padded, padding=0)}
    loss = compute_validation_loss(tiny_llama(), ROWS, accelerator=Accelerator(cpu=True), **settings)
    assert sum(each.tokens for each in total) == loss.tokens
    assert -sum(each.log_prob for each in total) / loss.tokens == pytest.approx(loss.loss, rel=1e-6)


def test_likelihoods_without_chunks_equal_those_in_chunks(monkeypatch: pytest.MonkeyPatch):
    in_chunks = found(ROWS)
    monkeypatch.setattr("finetune.train.loss._chunkable_transform", lambda model, batch: None)
    for got, expected in zip(found(ROWS), in_chunks, strict=True):
        assert got.log_prob == pytest.approx(expected.log_prob, abs=1e-5)


def test_likelihoods_in_small_chunks_are_equal(monkeypatch: pytest.MonkeyPatch):
    at_once = found(ROWS)
    monkeypatch.setattr("finetune.train.loss.LOGITS_PER_CHUNK", 700)  # two positions
    for got, expected in zip(found(ROWS), at_once, strict=True):
        assert got == Likelihood(pytest.approx(expected.log_prob, abs=1e-5), expected.tokens, expected.is_greedy)


def test_model_is_in_training_mode_afterwards_even_after_an_error(monkeypatch: pytest.MonkeyPatch):
    model = tiny_llama().train()
    found(ROWS, model)
    assert model.training
    monkeypatch.setattr(likelihood, "visit_log_probs", Mock(side_effect=RuntimeError("shapes")))
    with pytest.raises(RuntimeError, match="shapes"):
        found(ROWS, model)
    assert model.training

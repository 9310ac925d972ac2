"""Likelihoods of tokens are the model's own, whatever goes through it together."""

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
    Example([256, 80, 81, 92], [False, True, True, False]),  # not alike: what follows the targets is no target
]


def found(rows: list[Example], model: Any = None, **options: Any) -> list[Likelihood]:
    results: dict[int, Likelihood] = {}
    settings: dict[str, Any] = {"compute_dtype": torch.float32, "batch_size": 4, "padding": 0}
    settings |= {"may_share": lambda: False} | options
    likelihoods(model or tiny_llama(), rows, tell=results.update, **settings)
    return [results[number] for number in range(len(rows))]


@pytest.fixture(autouse=True)
def _few_tokens_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "WORTH_SHARING", 1)


def sharing() -> dict[str, Any]:
    """Options for a model that computes once what rows begin with alike."""
    model = tiny_llama()
    use_packing_attention(model, may_choose=True)
    return {"model": model, "may_share": lambda: prefix_sharing_blocker(model) is None}


def numbers_read(model: Any) -> list[tuple[int, ...]]:
    """Rows and tokens of each pass, as they come."""
    given: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return given


def by_hand(row: Example) -> Likelihood:
    with torch.no_grad():
        log_probs = tiny_llama()(torch.tensor([row.ids])).logits[0].log_softmax(-1)
    places = [place for place in range(1, len(row.ids)) if row.is_target[place]]
    chance = sum(float(log_probs[place - 1, row.ids[place]]) for place in places)
    is_greedy = all(int(log_probs[place - 1].argmax()) == row.ids[place] for place in places)
    return Likelihood(chance, len(places), is_greedy)


@pytest.mark.parametrize("options", [dict, sharing])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_they_are_those_of_each_row_by_itself(batch_size: int, options: Any):
    for got, expected in zip(found(ROWS, batch_size=batch_size, **options()), map(by_hand, ROWS), strict=True):
        assert got.log_prob == pytest.approx(expected.log_prob, abs=1e-4)
        assert (got.tokens, got.is_greedy) == (expected.tokens, expected.is_greedy)


def test_the_likeliest_end_is_told_as_greedy_among_rows_that_differ_in_it():
    with torch.no_grad():
        best = int(tiny_llama()(torch.tensor([[256, 5, 6, 7]])).logits[0, -1].argmax())
    rows = [Example([256, 5, 6, 7, end], [False] * 4 + [True]) for end in (1, best, 2)]
    assert [each.is_greedy for each in found(rows)] == [False, True, False]


def test_rows_that_differ_in_their_last_token_go_through_the_model_once():
    model = tiny_llama()
    given = numbers_read(model)
    rows = [Example([256, 5, 6, 7, end], [False] * 4 + [True]) for end in range(60, 64)]
    found(rows, model)
    assert given[-1] == (1, 4)  # the last token is not read either


def test_a_question_is_read_once_for_all_its_answers():
    question, answers = [256, *range(20, 49)], [[60, 61], [62, 63, 64], [60, 65], [66] * 4]
    rows = [
        Example(question + answer, [False] * len(question) + [True] * len(answer))
        for answer in answers
    ]  # fmt: skip
    options = sharing()
    given = numbers_read(options["model"])
    for got, expected in zip(found(rows, **options), map(by_hand, rows), strict=True):
        assert got.log_prob == pytest.approx(expected.log_prob, abs=1e-4)
    # The question but for its last token, which answers follow, and that with each answer, of which the last token is
    # not read; the two that differ in nothing else are one row.
    assert given[-1] == (1, 29 + (1 + 1) + (1 + 2) + (1 + 3))


def test_rows_that_have_nothing_in_common_are_not_tried():
    asked = Mock(return_value=True)
    found(ROWS[3:5], may_share=asked)
    assert not asked.called
    found(ROWS, may_share=asked, model=sharing()["model"])
    assert asked.called


def test_their_sum_is_the_held_out_loss():
    total = found(ROWS)
    settings = {"compute_dtype": torch.float32, "batch_size": 4, "make_batch": partial(padded, padding=0)}
    loss = compute_validation_loss(tiny_llama(), ROWS, accelerator=Accelerator(cpu=True), **settings)
    assert sum(each.tokens for each in total) == loss.tokens
    assert -sum(each.log_prob for each in total) / loss.tokens == pytest.approx(loss.loss, rel=1e-6)


def test_a_head_that_cannot_run_in_chunks_gives_the_same(monkeypatch: pytest.MonkeyPatch):
    in_chunks = found(ROWS)
    monkeypatch.setattr("finetune.train.loss._head_is_chunkable", lambda model, batch: False)
    for got, expected in zip(found(ROWS), in_chunks, strict=True):
        assert got.log_prob == pytest.approx(expected.log_prob, abs=1e-5)


def test_chunks_of_few_positions_give_the_same(monkeypatch: pytest.MonkeyPatch):
    whole = found(ROWS)
    monkeypatch.setattr("finetune.train.loss.LOGITS_PER_CHUNK", 700)  # two positions
    for got, expected in zip(found(ROWS), whole, strict=True):
        assert got == Likelihood(pytest.approx(expected.log_prob, abs=1e-5), expected.tokens, expected.is_greedy)


def test_the_model_trains_on_afterwards_even_where_it_failed(monkeypatch: pytest.MonkeyPatch):
    model = tiny_llama().train()
    found(ROWS, model)
    assert model.training
    monkeypatch.setattr(likelihood, "visit_log_probs", Mock(side_effect=RuntimeError("shapes")))
    with pytest.raises(RuntimeError, match="shapes"):
        found(ROWS, model)
    assert model.training

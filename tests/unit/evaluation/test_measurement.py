"""Confidence intervals, their coverage, and paired comparisons."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.evaluation.measurement import Column, difference, interval
from finetune.evaluation.metrics import LOSS, Metric, mean

BINARY = Metric("right", mean, is_binary=True)
GRADE = Metric("grade", mean)


def column(scores: list[float], metric: Metric = GRADE) -> Column:
    return Column.of(metric, [str(row) for row in range(len(scores))], [(score, 1) for score in scores])


def test_interval_of_a_mean_equals_the_normal_approximation():
    scores = np.random.default_rng(0).normal(3, 2, 400)
    found = interval(column(scores.tolist()))
    error = scores.std() / 20
    assert found.value == pytest.approx(scores.mean())
    assert (found.low, found.high) == pytest.approx((found.value - 1.96 * error, found.value + 1.96 * error), abs=0.02)


def test_interval_covers_the_true_mean_at_its_confidence():
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        found = interval(column(generator.exponential(1, 100).tolist()))
        hits += found.low <= 1 <= found.high
    assert 88 <= hits <= 99


def test_interval_of_all_correct_rows_is_wilsons():
    found = interval(column([1.0] * 12, BINARY))
    assert found.value == 1
    # Wilson 1927: n / (n + z^2) below, and 1 above.
    assert (found.low, found.high) == pytest.approx((12 / (12 + 1.959964**2), 1))


def test_loss_weighs_rows_by_their_tokens():
    found = interval(Column.of(LOSS, ["a", "b"], [(10, 10), (90, 30)]))
    assert found.value == pytest.approx(100 / 40)
    assert (found.low, found.high) == pytest.approx((1, 3))


def test_difference_of_a_model_from_itself_is_zero():
    same = column([0.0, 1.0, 0.5] * 20)
    found = difference(same, same)
    assert (found.change.value, found.change.low, found.change.high, found.better, found.worse) == (0, 0, 0, (), ())


def test_paired_difference_is_significant_where_intervals_overlap():
    theirs = np.random.default_rng(0).normal(0, 10, 200)
    ours = theirs + np.random.default_rng(1).normal(0.2, 0.5, 200)
    found = difference(column(ours.tolist()), column(theirs.tolist())).change
    assert found.low > 0
    alone = [interval(column(scores.tolist())) for scores in (ours, theirs)]
    assert alone[0].low < alone[1].high
    assert found.value == pytest.approx((ours - theirs).mean())


def test_difference_of_a_binary_metric_names_flipped_rows():
    ours, theirs = [1.0, 0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0, 0.0]
    found = difference(column(ours, BINARY), column(theirs, BINARY))
    assert (found.better, found.worse) == (("2", "4"), ("1",))
    graded = difference(column(ours), column(theirs))
    assert (graded.better, graded.worse) == ((), ())


def test_interval_is_reproducible_and_independent_of_chunks(
    monkeypatch: pytest.MonkeyPatch,
):
    scores = column(np.random.default_rng(3).normal(size=50).tolist())
    at_once = interval(scores)
    assert interval(scores) == at_once
    monkeypatch.setattr("finetune.evaluation.measurement.AT_ONCE", 120)
    assert interval(scores) == at_once

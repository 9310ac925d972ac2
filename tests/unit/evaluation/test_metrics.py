"""Metrics equal scores that were computed by hand."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest

from finetune.evaluation.metrics import (
    LOSS,
    PERPLEXITY,
    accuracy,
    answer_metrics,
    best_of,
    exact_match,
    json_valid,
    token_f1,
)
from finetune.recipe.sections.evaluation import Answers, TextMetricName

TEXTS = ["", "the", "Paris", "the city of Paris", "Paris, France!", "a a b", "a b b", "日本 東京", "..."]


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Paris", "Paris", 1),
        (" Paris\n", "Paris", 1),
        ("", "", 1),
        ("paris", "Paris", 0),
        ("Paris.", "Paris", 0),
        ("Pa ris", "Paris", 0),
        ("", "Paris", 0),
    ],
)
def test_exact_match_forgives_white_space_around_the_answer_and_nothing_else(
    answer: str, reference: str, expected: int
):
    assert exact_match(answer, reference) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Paris", "Paris", 1.0),
        ("the  PARIS!", "paris", 1.0),
        ("Paris", "London", 0.0),
        ("Paris France", "Paris", 2 / 3),
        ("x x y", "x y y", 2 / 3),
        ("x x x", "x", 0.5),
        ("", "", 1.0),
        ("the", "", 1.0),
        ("", "Paris", 0.0),
        ("Paris", "...", 0.0),
        ("theatre", "atre", 0.0),
        ("日本 東京", "東京", 2 / 3),
    ],
)
def test_f1_is_the_harmonic_mean_over_words(answer: str, reference: str, expected: float):
    assert token_f1(answer, reference) == pytest.approx(expected)


def test_f1_is_symmetric_bounded_and_1_where_the_texts_are_equal():
    for first, second in itertools.product(TEXTS, TEXTS):
        assert token_f1(first, second) == token_f1(second, first)
        assert 0 <= token_f1(first, second) <= 1
    assert all(token_f1(text, text) == 1 for text in TEXTS)


def test_f1_of_exact_matches_is_1():
    pairs = [(a, b) for a, b in itertools.product(TEXTS, TEXTS) if exact_match(a, b)]
    assert all(token_f1(a, b) == 1 for a, b in pairs)


def test_f1_ignores_the_order_of_words():
    assert token_f1("one two three", "three one two") == 1


def test_best_of_scores_against_the_closest_reference():
    assert best_of(exact_match, "Ann", ("Miss Ann", "Ann")) == 1
    assert best_of(token_f1, "Ann", ("Bob", "Miss Ann")) == token_f1("Ann", "Miss Ann")


@pytest.mark.parametrize(("answer", "expected"), [("the  PARIS!", 1), ("Paris", 1), ("Paris France", 0), ("", 0)])
def test_accuracy_forgives_case_punctuation_and_articles(answer: str, expected: int):
    assert accuracy(answer, "Paris.") == expected


@pytest.mark.parametrize("answer", ['{"a": [1, null]}', ' "x"\n', "3e2", "true"])
def test_json_valid_accepts_json(answer: str):
    assert json_valid(answer) == 1


@pytest.mark.parametrize("answer", ["", "{'a': 1}", '{"a": 1} and more', '{"a": NaN}', "Infinity", "[" * 100_000])
def test_json_valid_rejects_anything_else(answer: str):
    assert json_valid(answer) == 0


def scores_of(metrics: list[str], rows: list[tuple[str, list[str]]], pattern: str | None = None) -> dict[str, float]:
    section = Answers.model_validate({"metrics": metrics, "pattern": pattern})
    return {
        metric.name: metric.score(np.sum([metric.count(*row) for row in rows], axis=0))
        for metric in answer_metrics(section)
    }


def test_answer_metrics_are_means_of_the_best_reference():
    rows = [("Ann", ["Bob", "Ann"]), ("Ann Lee", ["Ann"]), ("5", ["6"])]
    assert scores_of(["f1", "exact_match"], rows) == {
        "f1": pytest.approx((1 + 2 / 3 + 0) / 3),
        "exact_match": pytest.approx(1 / 3),
    }


def test_pattern_metric_counts_answers_that_contain_it():
    rows = [("it is 5", ["x"]), ("five", ["x"]), ("55", ["x"])]
    assert scores_of([], rows, pattern=r"\b\d\b") == {"pattern": pytest.approx(1 / 3)}


@pytest.mark.parametrize("name", get_args(TextMetricName))
def test_metric_of_a_perfect_answer_is_its_maximum(name: str):
    text = '"one two three four"'
    (metric,) = answer_metrics(Answers.model_validate({"metrics": [name]}))
    assert scores_of([name], [(text, ["other", text])])[name] == pytest.approx(100 if metric.unit == "points" else 1)


def test_perplexity_is_the_exponential_of_the_mean_loss_per_token():
    counts = np.array([[2.0, 4], [1.0, 1]]).sum(0)
    assert LOSS.score(counts) == pytest.approx(3 / 5)
    assert PERPLEXITY.score(counts) == pytest.approx(np.exp(3 / 5))
    assert PERPLEXITY.score(np.array([1e6, 1.0])) == float("inf")

"""Scores that can be worked out by hand."""

from __future__ import annotations

import itertools

import pytest

from finetune.evaluation.metrics import best_of, exact_match, token_f1

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


def test_what_matches_exactly_has_an_f1_of_1():
    pairs = [(a, b) for a, b in itertools.product(TEXTS, TEXTS) if exact_match(a, b)]
    assert all(token_f1(a, b) == 1 for a, b in pairs)


def test_the_order_of_words_does_not_matter_for_f1():
    assert token_f1("one two three", "three one two") == 1


def test_an_answer_is_scored_against_the_reference_that_it_fits_best():
    assert best_of(exact_match, "Ann", ("Miss Ann", "Ann")) == 1
    assert best_of(token_f1, "Ann", ("Bob", "Miss Ann")) == token_f1("Ann", "Miss Ann")

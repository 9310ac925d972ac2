"""ROUGE, BLEU and chrF are the numbers of the packages that papers use."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from finetune.evaluation.metrics import best_of
from finetune.evaluation.overlap import bleu, bleu_counts, chrf, chrf_counts, rouge_l, rouge_n

ROWS: list[tuple[str, list[str]]] = [
    ("The cat sat on the mat.", ["The cat sat on a mat.", "A cat was sitting on the mat."]),
    ("It costs 3,5 euros -- not 1-2!", ["It costs 3.5 euros, not 1-2."]),
    ("Grüße aus 東京", ["Grüße aus Tokio", "Viele Grüße aus 東京"]),
    ("", ["Nothing was said."]),
    ("she said &quot;yes&quot; and left the room at once", ['she said "yes" and left the room at once']),
]

WORDS = [
    *[
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        ".",
        ",",
        "3.5",
        "1-2",
        "don't",
        "&amp;",
        "A-b",
        "(x)",
        "Grüße",
        "東京",
        "foo/bar",
        "end-\nof",
    ],
    "\n",
]


def corpus_bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    return bleu(np.array([bleu_counts(*row) for row in zip(answers, references, strict=True)], float).sum(0))


def corpus_chrf(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    return chrf(np.array([chrf_counts(*row) for row in zip(answers, references, strict=True)], float).sum(0))


def test_bleu_and_chrf_are_what_sacrebleu_2_6_found():
    answers, references = zip(*ROWS, strict=True)
    assert corpus_bleu(answers, references) == pytest.approx(64.85353055654569, abs=1e-9)
    assert corpus_chrf(answers, references) == pytest.approx(59.83522046365744, abs=1e-9)


def test_rouge_is_what_rouge_score_0_1_2_found():
    expected = [
        (0.8333333333333334, 0.6, 0.8333333333333334),
        (1.0, 1.0, 1.0),
        (0.8571428571428571, 0.8, 0.8571428571428571),
        (0.0, 0.0, 0.0),
        (0.9, 0.6666666666666665, 0.9),
    ]
    for (answer, references), numbers in zip(ROWS, expected, strict=True):
        found = (
            best_of(lambda given, wanted: rouge_n(given, wanted, 1), answer, references),
            best_of(lambda given, wanted: rouge_n(given, wanted, 2), answer, references),
            best_of(rouge_l, answer, references),
        )
        assert found == pytest.approx(numbers, abs=1e-12)


def test_bleu_of_an_equal_corpus_is_100_and_of_a_shorter_one_less():
    text = "one two three four five six"
    assert corpus_bleu([text], [[text]]) == pytest.approx(100)
    # All n-grams match; 5 words for 6 are punished by exp(1 - 6/5).
    assert corpus_bleu(["one two three four five"], [[text]]) == pytest.approx(100 * np.exp(-0.2))
    assert corpus_bleu(["seven"], [[text]]) == 0


def test_chrf_ignores_white_space_and_weighs_recall_twice():
    assert corpus_chrf(["a b c d e f g"], [["abcdefg"]]) == pytest.approx(100)
    # One letter of two: precision 1, recall 1/2 over the one order that both have.
    assert corpus_chrf(["a"], [["ab"]]) == pytest.approx(100 * 5 * 0.5 / (4 + 0.5))


def test_random_texts_are_scored_as_the_packages_score_them():
    sacrebleu = pytest.importorskip("sacrebleu")
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    draw = random.Random(0)

    def text() -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(0, 12)))

    for _ in range(50):
        rows, of_each = draw.randint(1, 6), draw.randint(1, 3)
        answers, references = [text() for _ in range(rows)], [[text() for _ in range(of_each)] for _ in range(rows)]
        streams = [list(stream) for stream in zip(*references, strict=True)]
        assert corpus_bleu(answers, references) == pytest.approx(
            sacrebleu.BLEU().corpus_score(answers, streams).score, abs=1e-9
        )
        assert corpus_chrf(answers, references) == pytest.approx(
            sacrebleu.CHRF().corpus_score(answers, streams).score, abs=1e-9
        )
        for answer, (wanted, *_) in zip(answers, references, strict=True):
            scores = scorer.score(wanted, answer)
            assert rouge_n(answer, wanted, 1) == pytest.approx(scores["rouge1"].fmeasure, abs=1e-12)
            assert rouge_n(answer, wanted, 2) == pytest.approx(scores["rouge2"].fmeasure, abs=1e-12)
            assert rouge_l(answer, wanted) == pytest.approx(scores["rougeL"].fmeasure, abs=1e-12)

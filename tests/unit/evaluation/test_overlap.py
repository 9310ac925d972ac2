"""ROUGE, BLEU and chrF equal the numbers of the packages that papers use."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import sacrebleu

from finetune.evaluation.metrics import best_of
from finetune.evaluation.overlap import bleu, bleu_counts, chrf, chrf_counts, rouge_l, rouge_n

ROWS: list[tuple[str, list[str]]] = [
    ("The cat sat on the mat.", ["The cat sat on a mat.", "A cat was sitting on the mat."]),
    ("It costs 3,5 euros -- not 1-2!", ["It costs 3.5 euros, not 1-2."]),
    ("Grüße aus 東京", ["Grüße aus Tokio", "Viele Grüße aus 東京"]),
    ("", ["Nothing was said."]),
    ("she said &quot;yes&quot; and left the room at once", ['she said "yes" and left the room at once']),
]

WORDS = ["the", "cat", "sat", "on", "a", "mat", ".", ",", "3.5", "1-2", "don't", "&amp;"]
WORDS += ["A-b", "(x)", "Grüße", "東京", "foo/bar", "end-\nof", "\n"]


def corpus_bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    return bleu(np.array([bleu_counts(*row) for row in zip(answers, references, strict=True)], float).sum(0))


def corpus_chrf(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    return chrf(np.array([chrf_counts(*row) for row in zip(answers, references, strict=True)], float).sum(0))


def random_text(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(0, 12)))


def test_bleu_and_chrf_keep_the_scores_of_earlier_versions():
    answers, references = zip(*ROWS, strict=True)
    assert corpus_bleu(answers, references) == pytest.approx(64.85353055654569, abs=1e-9)
    assert corpus_chrf(answers, references) == pytest.approx(59.83522046365744, abs=1e-9)


def test_bleu_and_chrf_of_summed_row_counts_equal_sacrebleu_on_random_corpora():
    draw = random.Random(0)
    for _ in range(50):
        rows, of_each = draw.randint(1, 6), draw.randint(1, 3)
        answers = [random_text(draw) for _ in range(rows)]
        references = [[random_text(draw) for _ in range(of_each)] for _ in range(rows)]
        streams = [list(stream) for stream in zip(*references, strict=True)]
        expected = sacrebleu.corpus_bleu(answers, streams).score, sacrebleu.corpus_chrf(answers, streams).score
        assert (corpus_bleu(answers, references), corpus_chrf(answers, references)) == pytest.approx(expected, abs=1e-9)


def test_sacrebleu_is_imported_on_demand_only():
    program = "import sys, finetune.evaluation.overlap as o"
    program += "; assert 'sacrebleu' not in sys.modules; o.bleu_counts('', [''])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_rouge_keeps_the_scores_of_rouge_score_0_1_2():
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


def test_rouge_equals_rouge_score_on_random_texts():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    draw = random.Random(0)
    for _ in range(150):
        answer, wanted = random_text(draw), random_text(draw)
        scores = scorer.score(wanted, answer)
        assert rouge_n(answer, wanted, 1) == pytest.approx(scores["rouge1"].fmeasure, abs=1e-12)
        assert rouge_n(answer, wanted, 2) == pytest.approx(scores["rouge2"].fmeasure, abs=1e-12)
        assert rouge_l(answer, wanted) == pytest.approx(scores["rougeL"].fmeasure, abs=1e-12)


def test_bleu_of_equal_texts_is_100_and_a_shorter_answer_is_penalized():
    text = "one two three four five six"
    assert corpus_bleu([text], [[text]]) == pytest.approx(100)
    # All n-grams match; the brevity penalty for 5 words instead of 6 is exp(1 - 6/5).
    assert corpus_bleu(["one two three four five"], [[text]]) == pytest.approx(100 * np.exp(-0.2))
    assert corpus_bleu(["seven"], [[text]]) == 0


def test_chrf_ignores_white_space_and_weighs_recall_twice():
    assert corpus_chrf(["a b c d e f g"], [["abcdefg"]]) == pytest.approx(100)
    # One character of two: precision 1, recall 1/2 over the one order that both texts have.
    assert corpus_chrf(["a"], [["ab"]]) == pytest.approx(100 * 5 * 0.5 / (4 + 0.5))

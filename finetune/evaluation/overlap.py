"""ROUGE, BLEU and chrF: the overlap of an answer with its references, counted row by row and scored over all rows.

ROUGE is a mean over rows. BLEU and chrF are not: their counts are summed over the corpus first. sacrebleu counts and
scores them; counts and score stay separate here, so that a confidence interval can resample rows and sum them again.
Shape legend: C counts of a row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric as CorpusMetric

Numbers = npt.NDArray[np.float64]

_NOT_A_WORD = re.compile(r"[^a-z0-9]+")


def rouge_n(answer: str, reference: str, order: int) -> float:
    """F-measure over n-grams of words, in [0, 1]; without stemming, the default of the package rouge-score.

    Source: Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries, section 2.
    """
    given, wanted = (Counter(_grams(_rouge_words(text), order)) for text in (answer, reference))
    return _f_measure((given & wanted).total(), given.total(), wanted.total())


def rouge_l(answer: str, reference: str) -> float:
    """F-measure over the longest common subsequence of words, in [0, 1].

    Source: Lin 2004, section 3.1.
    """
    given, wanted = _rouge_words(answer), _rouge_words(reference)
    return _f_measure(_common_subsequence(given, wanted), len(given), len(wanted))


def bleu_counts(answer: str, references: Sequence[str]) -> list[float]:
    """The counts for BLEU: words, words of the closest reference, then matching and all n-grams by order."""
    return _counts(_bleu(), answer, references)


def bleu(counts_C: Numbers) -> float:
    """BLEU from the sum of its counts, in [0, 100]: `13a` tokenization and `exp` smoothing, sacrebleu's defaults.

    Source: Papineni et al. 2002, BLEU, section 2.3; smoothing: Chen and Cherry 2014, section 3, method 3; Post 2018,
    A Call for Clarity in Reporting BLEU Scores.
    """
    return _score(_bleu(), counts_C)


def chrf_counts(answer: str, references: Sequence[str]) -> list[float]:
    """The counts for chrF: by order, the answer's n-grams of characters, the reference's and those of both.

    Of several references the one with the highest score counts.
    """
    return _counts(_chrf(), answer, references)


def chrf(counts_C: Numbers) -> float:
    """chrF2 from the sum of its counts, in [0, 100].

    Source: Popović 2015, chrF, section 2; orders without n-grams in either text are dropped from the mean.
    """
    return _score(_chrf(), counts_C)


@cache
def _bleu() -> CorpusMetric:
    from sacrebleu.metrics.bleu import BLEU  # on demand: most evaluations ask for neither

    return BLEU()


@cache
def _chrf() -> CorpusMetric:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


# `corpus_score` of sacrebleu returns the score of a full corpus only. The two methods below are the halves of it that
# sacrebleu's own bootstrap calls (sacrebleu/significance.py).


def _counts(metric: CorpusMetric, answer: str, references: Sequence[str]) -> list[float]:
    # sacrebleu takes one list of rows for each reference, not one list of references for each row.
    (counts,) = metric._extract_corpus_statistics([answer], [[reference] for reference in references])
    return list(counts)


def _score(metric: CorpusMetric, counts_C: Numbers) -> float:
    return float(metric._compute_score_from_stats(counts_C.tolist()).score)


def _grams(units: Sequence[str], order: int) -> Iterator[Any]:
    """All n-grams of `order` words."""
    return (tuple(units[begin : begin + order]) for begin in range(len(units) - order + 1))


def _rouge_words(text: str) -> list[str]:
    return _NOT_A_WORD.sub(" ", text.lower()).split()


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    # Dynamic programming over prefixes, one row of the table at a time: memory is O(len(second)).
    row = [0] * (len(second) + 1)
    for unit in first:
        before = row
        row = [0]
        for place, other in enumerate(second):
            row.append(before[place] + 1 if unit == other else max(before[place + 1], row[place]))
    return row[-1]


def _f_measure(common: int, given: int, wanted: int) -> float:
    # 2PR / (P + R) with P = common / given and R = common / wanted.
    return 2 * common / (given + wanted) if common else 0.0

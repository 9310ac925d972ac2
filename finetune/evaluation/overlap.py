"""ROUGE, BLEU and chrF: how much of an answer is in its references, counted row by row and scored over all of them.

BLEU and chrF are not means over rows: their counts are added up first. Counts and score stand apart here, so that a
confidence interval can draw rows and add them up again. Shape legend: C counts of a row.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]

BLEU_ORDER = 4
CHRF_ORDER = 6
CHRF_BETA = 2

_NOT_A_WORD = re.compile(r"[^a-z0-9]+")

# The rules of mteval-v13a, by which published BLEU scores are made comparable.
_ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
_SEPARATED = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def rouge_n(answer: str, reference: str, order: int) -> float:
    """F-measure over n-grams of words, in [0, 1]; without stemming, as the package rouge-score has it.

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
    """Of one answer: its words, those of the reference of the nearest length, matching n-grams and all, by order.

    Returns:
        C = 2 + 2 * BLEU_ORDER numbers.
    """
    given, wanted = _bleu_words(answer), [_bleu_words(reference) for reference in references]
    nearest = min((len(words) for words in wanted), key=lambda length: (abs(length - len(given)), length))
    matching, total = [], []
    for order in range(1, BLEU_ORDER + 1):
        grams = Counter(_grams(given, order))
        accepted: Counter[Any] = Counter()
        for words in wanted:
            accepted |= Counter(_grams(words, order))
        matching.append((grams & accepted).total())
        total.append(grams.total())
    return [len(given), nearest, *matching, *total]


def bleu(counts_C: Numbers) -> float:
    """BLEU from the sum of its counts, in [0, 100], smoothed as sacrebleu does by default (`exp`).

    Source: Papineni et al. 2002, BLEU, section 2.3; smoothing: Chen and Cherry 2014, section 3, method 3.
    """
    words, wanted = counts_C[:2]
    matching, total = counts_C[2 : 2 + BLEU_ORDER], counts_C[2 + BLEU_ORDER :]
    if not matching.any() or not total.all():
        return 0.0
    precisions, halvings = [], 0
    for matches, grams in zip(matching, total, strict=True):
        halvings += not matches
        precisions.append(matches / grams if matches else 0.5**halvings / grams)
    brevity = min(0.0, 1 - wanted / words)
    return 100 * math.exp(brevity + float(np.log(precisions).mean()))


def chrf_counts(answer: str, references: Sequence[str]) -> list[float]:
    """Of one answer, by order of the n-grams of letters: its own, those of the reference and those of both.

    Of several references the one that gives the highest score counts.

    Returns:
        C = 3 * CHRF_ORDER numbers.
    """
    return max((_chrf_counts(answer, reference) for reference in references), key=lambda row: chrf(np.array(row)))


def chrf(counts_C: Numbers) -> float:
    """chrF2 from the sum of its counts, in [0, 100].

    Source: Popović 2015, chrF, section 2; orders that no text has are left out, as sacrebleu does.
    """
    given, wanted, common = counts_C.reshape(CHRF_ORDER, 3).T
    has_order = (given > 0) & (wanted > 0)
    if not has_order.any():
        return 0.0
    precision, recall = ((common[has_order] / of[has_order]).mean() for of in (given, wanted))
    if not precision + recall:
        return 0.0
    weight = CHRF_BETA**2
    return float(100 * (1 + weight) * precision * recall / (weight * precision + recall))


def _chrf_counts(answer: str, reference: str) -> list[float]:
    given, wanted = ("".join(text.split()) for text in (answer, reference))
    counts: list[float] = []
    for order in range(1, CHRF_ORDER + 1):
        of_answer, of_reference = Counter(_grams(given, order)), Counter(_grams(wanted, order))
        common = (of_answer & of_reference).total()
        counts += [of_answer.total() if of_reference else 0, of_reference.total(), common]
    return counts


def _grams(units: Sequence[str], order: int) -> Iterator[Any]:
    """All runs of `order` words or letters."""
    return (tuple(units[begin : begin + order]) for begin in range(len(units) - order + 1))


def _rouge_words(text: str) -> list[str]:
    return _NOT_A_WORD.sub(" ", text.lower()).split()


def _bleu_words(text: str) -> list[str]:
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, letter in _ENTITIES.items():
        text = text.replace(entity, letter)
    text = f" {text} "
    for pattern, replacement in _SEPARATED:
        text = pattern.sub(replacement, text)
    return text.split()


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest one."""
    row = [0] * (len(second) + 1)
    for unit in first:
        before = row
        row = [0]
        for place, other in enumerate(second):
            row.append(before[place] + 1 if unit == other else max(before[place + 1], row[place]))
    return row[-1]


def _f_measure(common: int, given: int, wanted: int) -> float:
    return 2 * common / (given + wanted) if common else 0.0

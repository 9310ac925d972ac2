"""Scores of a generated answer against the data set's own."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def best_of(metric: Callable[[str, str], float], answer: str, references: Sequence[str]) -> float:
    """The highest score of an answer over all references, as SQuAD scores it."""
    return max(metric(answer, reference) for reference in references)


def exact_match(answer: str, reference: str) -> float:
    """1 where the two texts are equal but for white space around them, else 0."""
    return float(answer.strip() == reference.strip())


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, in [0, 1].

    Source: Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1, with that paper's normalisation: lower case,
    no punctuation, no articles.
    """
    given, wanted = _words(answer), _words(reference)
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()

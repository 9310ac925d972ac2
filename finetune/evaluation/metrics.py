"""Scores of a model's answers against reference answers.

A metric is a vector of counts per row, and a score of their sum. A bootstrap can therefore resample rows and sum their
counts again. Most metrics count (score of the row, 1), so that the score of the sum is the mean.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from finetune.evaluation import overlap
from finetune.evaluation.overlap import Numbers
from finetune.recipe.sections.evaluation import Answers

MetricUnit = Literal["share", "points", "nats"]
"""`share`: a fraction in [0, 1]. `points`: in [0, 100]. `nats`: a loss or its exponential. Values in `results.json`."""

# Removed before words are compared, as in the evaluation script of SQuAD.
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Metric:
    """A score of many rows.

    Attributes:
        name: In results and gates.
        score: The score, given the sum of the rows' counts, shape (C,).
        unit: Its unit.
        is_binary: Whether each row scores 0 or 1.
        is_biased: Whether samples of few rows have lower scores on average, so that resamples have too.
    """

    name: str
    score: Callable[[Numbers], float]
    unit: MetricUnit = "share"
    is_binary: bool = False
    is_biased: bool = False


@dataclass(frozen=True)
class AnswerMetric(Metric):
    """A score of generated answers.

    Attributes:
        count: A row's counts (C,), given its answer and references.
    """

    count: Callable[[str, Sequence[str]], Sequence[float]] = lambda answer, references: ()


def prediction(answer: str) -> str:
    """The answer without its reasoning: the text after the last `</think>`, or all of it."""
    return answer.rpartition("</think>")[2]


def mean(counts_C: Numbers) -> float:
    """The first count over the last."""
    return float(counts_C[0] / counts_C[-1])


def perplexity(counts_C: Numbers) -> float:
    """exp(mean); infinite where that exceeds float64."""
    return math.exp(loss) if (loss := mean(counts_C)) < 700 else math.inf


LOSS = Metric("loss", mean, unit="nats")
PERPLEXITY = Metric("perplexity", perplexity, unit="nats")


def answer_metrics(section: Answers) -> list[AnswerMetric]:
    """The metrics of a section that compare texts, in its order; those of calls are in `evaluation/calls`."""
    metrics = [_METRICS[name] for name in dict.fromkeys(section.metrics) if name in _METRICS]
    if section.pattern is not None:
        metrics.append(_mean_of("pattern", partial(_is_found, re.compile(section.pattern)), is_binary=True))
    return metrics


def best_of(metric: Callable[[str, str], float], answer: str, references: Sequence[str]) -> float:
    """The highest score of an answer over all references, as SQuAD scores it."""
    return max(metric(answer, reference) for reference in references)


def exact_match(answer: str, reference: str) -> float:
    """1 where the two texts are equal except for white space around them, else 0."""
    return float(answer.strip() == reference.strip())


def accuracy(answer: str, reference: str) -> float:
    """1 where the two texts have the same words in the same order, normalised as for F1, else 0."""
    return float(_words(answer) == _words(reference))


def json_valid(answer: str) -> float:
    """1 where the answer is a single JSON value (RFC 8259), with white space around it at most, else 0."""
    try:
        json.loads(answer, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # answers may be nested deeper than Python's stack
        return 0.0
    return 1.0


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, in [0, 1].

    Source: Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1, with that paper's normalisation: lower case,
    no punctuation, no articles.
    """
    given, wanted = _words(answer), _words(reference)
    if not given or not wanted:  # F1 is undefined: 1 only if both are empty, as in the evaluation script of SQuAD
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())  # a repeated word counts as often as both have it
    if not common:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _refuse_constant(name: str) -> None:
    """Python's parser accepts NaN and Infinity, which are not JSON."""
    raise ValueError(name)


def _is_found(pattern: re.Pattern[str], answer: str, references: Sequence[str]) -> float:
    return float(pattern.search(answer) is not None)


def _mean_of(name: str, score: Callable[[str, Sequence[str]], float], *, is_binary: bool = False) -> AnswerMetric:
    return AnswerMetric(name, mean, is_binary=is_binary, count=lambda *row: (score(*row), 1.0))


_METRICS = {
    metric.name: metric
    for metric in (
        _mean_of("exact_match", partial(best_of, exact_match), is_binary=True),
        _mean_of("f1", partial(best_of, token_f1)),
        _mean_of("accuracy", partial(best_of, accuracy), is_binary=True),
        _mean_of("rouge1", partial(best_of, partial(overlap.rouge_n, order=1))),
        _mean_of("rouge2", partial(best_of, partial(overlap.rouge_n, order=2))),
        _mean_of("rouge_l", partial(best_of, overlap.rouge_l)),
        AnswerMetric("bleu", overlap.bleu, unit="points", count=overlap.bleu_counts),
        AnswerMetric("chrf", overlap.chrf, unit="points", count=overlap.chrf_counts),
        _mean_of("json_valid", lambda answer, references: json_valid(answer), is_binary=True),
    )
}

"""Scores of a model in a task with confidence intervals. Shape legend: N rows, C counts of a metric."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.evaluation.metrics import Metric
from finetune.evaluation.overlap import Numbers

if TYPE_CHECKING:
    from finetune.evaluation.classes import Classes

CONFIDENCE = 0.95
RESAMPLES = 2000
AT_ONCE = 1 << 22
"""Elements of the matrix of resampled row counts that are in memory at the same time."""


@dataclass(frozen=True)
class Column:
    """One metric over the rows of a task.

    Attributes:
        metric: The metric.
        rows: The location of each row.
        counts_NC: The counts of the metric in each row.
    """

    metric: Metric
    rows: tuple[str, ...]
    counts_NC: Numbers

    @classmethod
    def of(cls, metric: Metric, rows: Sequence[str], counts: Sequence[Sequence[float]]) -> Column:
        """From the counts of rows, at least one."""
        return cls(metric, tuple(rows), np.array(counts, np.float64))

    @property
    def value(self) -> float:
        """The score of all rows."""
        return self.metric.score(self.counts_NC.sum(0))

    def row_score(self, row: int) -> float:
        """The score of a row by itself."""
        return self.metric.score(self.counts_NC[row])


@dataclass(frozen=True)
class Measurement:
    """Scores of a model in a task.

    Attributes:
        columns: The metrics with counts per row.
        records: The prediction for each row, as JSON values; each names its `row`.
        further: Scores without counts per row.
        classes: References and answers as labels, where the rows are a classification.
    """

    columns: tuple[Column, ...]
    records: tuple[dict[str, Any], ...]
    further: dict[str, float]
    classes: Classes | None = None


@dataclass(frozen=True)
class Interval:
    """A value and its confidence interval at the level `CONFIDENCE`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two models on the same rows.

    Attributes:
        change: Ours minus theirs.
        better: Rows that only ours has right; empty unless the metric is binary.
        worse: Rows that only theirs has right; empty unless the metric is binary.
    """

    change: Interval
    better: tuple[str, ...]
    worse: tuple[str, ...]


def interval(column: Column) -> Interval:
    """The score with its confidence interval.

    Binary metrics get Wilson's score interval, because a bootstrap of rows that are all right has no width. All other
    metrics get the percentile bootstrap over rows, with a fixed seed; biased ones the basic bootstrap,
    and Wilson's interval where all resamples are equal.

    Source: Wilson 1927, Probable Inference; Efron 1979, Bootstrap Methods; for scores of corpora Koehn 2004, section 3.
    """
    if column.metric.is_binary:
        return _wilson(column.value, len(column.rows))
    spread = _spread(column.value, [column.metric.score(sum_C) for sum_C in _resampled(column.counts_NC)])
    if not column.metric.is_biased:
        return spread
    # All rows are right, or all wrong: their resamples are too.
    return _wilson(column.value, len(column.rows)) if spread.low == spread.high else _reflected(spread)


def difference(ours: Column, theirs: Column) -> PairedDifference:
    """The paired bootstrap: every resample takes the same rows of both models.

    Source: Koehn 2004, Statistical Significance Tests for Machine Translation Evaluation, section 4.
    """
    assert ours.rows == theirs.rows, "both models are measured on the same rows"
    # Side by side, so that one resample of rows sums the counts of both models.
    split = ours.counts_NC.shape[1]
    score = ours.metric.score  # of a sum, not a mean of scores: BLEU and perplexity are no means over rows
    both = np.hstack([ours.counts_NC, theirs.counts_NC])
    changes = [score(sum_C[:split]) - score(sum_C[split:]) for sum_C in _resampled(both)]
    flips = [ours.row_score(row) - theirs.row_score(row) for row in range(len(ours.rows))]
    by_row = list(zip(ours.rows, flips, strict=True)) if ours.metric.is_binary else []
    return PairedDifference(
        change=_spread(ours.value - theirs.value, changes),
        better=tuple(row for row, flip in by_row if flip > 0),
        worse=tuple(row for row, flip in by_row if flip < 0),
    )


def _wilson(fraction: float, rows: int) -> Interval:
    """Wilson 1927, equation for the interval of a binomial proportion, without continuity correction."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    middle = (fraction + z**2 / (2 * rows)) / (1 + z**2 / rows)
    reach = z / (1 + z**2 / rows) * math.sqrt(fraction * (1 - fraction) / rows + z**2 / (4 * rows**2))
    # Clipped: rounding puts the ends slightly outside of [0, 1] for fractions of 0 and 1.
    return Interval(fraction, max(0.0, middle - reach), min(1.0, middle + reach))


def _reflected(spread: Interval) -> Interval:
    """The basic bootstrap interval of a score in [0, 1], from that of percentiles; on the scale arcsin(sqrt(score)).

    Resamples of few rows miss labels as the rows themselves do, so that their macro-F1 is too low by about as much: the
    percentiles of 300 rows with 77 labels covered the true value in 39 of 100 simulated samples, their reflections in
    94. On the scale of scores itself, intervals near 1 are too short.

    Source: Davison and Hinkley 1997, Bootstrap Methods and their Application, equation 5.6 and section 5.2.1.
    """
    value, low, high = (
        math.asin(math.sqrt(min(1.0, max(0.0, end)))) for end in (spread.value, spread.low, spread.high)
    )
    ends = (math.sin(min(math.pi / 2, max(0.0, 2 * value - end))) ** 2 for end in (high, low))
    return Interval(spread.value, *ends)


def _resampled(counts_NC: Numbers) -> Iterator[Numbers]:
    """RESAMPLES sums of the counts (C,) of N rows that are drawn with replacement; the same draws for the same N."""
    rows = len(counts_NC)
    generator = np.random.default_rng(rows)  # the seed is N: equal rows of two models get equal resamples
    at_once = max(1, AT_ONCE // rows)  # chunks do not change the stream of random numbers
    for begin in range(0, RESAMPLES, at_once):
        # How often each row was drawn: (resamples, N) @ (N, C) sums the counts without copying rows.
        draws = generator.multinomial(rows, np.full(rows, 1 / rows), size=min(at_once, RESAMPLES - begin))
        yield from draws @ counts_NC


def _spread(value: float, draws: Sequence[float]) -> Interval:
    tail = (1 - CONFIDENCE) / 2  # two-sided
    with np.errstate(invalid="ignore"):  # infinite perplexities: inf - inf is NaN
        low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(value, float(low), float(high))

"""What a model reached in a task, and how sure that is. Shape legend: N rows, C counts of a metric."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from finetune.evaluation.metrics import Metric
from finetune.evaluation.overlap import Numbers

CONFIDENCE = 0.95
RESAMPLES = 2000
AT_ONCE = 1 << 22
"""Numbers of drawn rows that exist together."""


@dataclass(frozen=True)
class Column:
    """One metric over the rows of a task.

    Attributes:
        metric: The metric.
        rows: The place of each row.
        counts_NC: What the metric counts in each row.
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
    """What a model reached in a task.

    Attributes:
        columns: The metrics that are counted row by row.
        records: What it said to each row, as JSON values; each names its `row`.
        further: Scores that nothing is known of row by row.
    """

    columns: tuple[Column, ...]
    records: tuple[dict[str, Any], ...]
    further: dict[str, float]


@dataclass(frozen=True)
class Interval:
    """A number, and the interval that holds its true value with `CONFIDENCE`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """How far one model is from another on the same rows.

    Attributes:
        change: Ours less theirs.
        better: Rows that only ours has right, where a row is right or wrong.
        worse: Rows that only theirs has right.
    """

    change: Interval
    better: tuple[str, ...]
    worse: tuple[str, ...]


def interval(column: Column) -> Interval:
    """The score with its interval.

    Of shares of rows that are right, Wilson's: no draw of rows that are all right tells how sure that is. Of all others
    the percentile bootstrap over rows, drawn by one seed.

    Source: Wilson 1927, Probable Inference; Efron 1979, Bootstrap Methods; for scores of corpora Koehn 2004, section 3.
    """
    if column.metric.is_binary:
        return _wilson(column.value, len(column.rows))
    return _spread(column.value, [column.metric.score(sum_C) for sum_C in _resampled(column.counts_NC)])


def difference(ours: Column, theirs: Column) -> PairedDifference:
    """The paired comparison of two models: each draw takes the same rows of both.

    Source: Koehn 2004, Statistical Significance Tests for Machine Translation Evaluation, section 4.
    """
    assert ours.rows == theirs.rows, "both models answer the same rows"
    split = ours.counts_NC.shape[1]
    score = ours.metric.score
    both = np.hstack([ours.counts_NC, theirs.counts_NC])
    changes = [score(sum_C[:split]) - score(sum_C[split:]) for sum_C in _resampled(both)]
    flips = [ours.row_score(row) - theirs.row_score(row) for row in range(len(ours.rows))]
    places = list(zip(ours.rows, flips, strict=True)) if ours.metric.is_binary else []
    return PairedDifference(
        change=_spread(ours.value - theirs.value, changes),
        better=tuple(row for row, flip in places if flip > 0),
        worse=tuple(row for row, flip in places if flip < 0),
    )


def _wilson(share: float, rows: int) -> Interval:
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    middle = (share + z**2 / (2 * rows)) / (1 + z**2 / rows)
    reach = z / (1 + z**2 / rows) * math.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))
    return Interval(share, max(0.0, middle - reach), min(1.0, middle + reach))


def _resampled(counts_NC: Numbers) -> Iterator[Numbers]:
    """The sum of the counts of as many rows, drawn with repetition, RESAMPLES times; the same draws for the same N."""
    rows = len(counts_NC)
    generator = np.random.default_rng(rows)
    at_once = max(1, AT_ONCE // rows)
    for begin in range(0, RESAMPLES, at_once):
        draws = generator.multinomial(rows, np.full(rows, 1 / rows), size=min(at_once, RESAMPLES - begin))
        yield from draws @ counts_NC


def _spread(value: float, draws: Sequence[float]) -> Interval:
    tail = (1 - CONFIDENCE) / 2
    with np.errstate(invalid="ignore"):  # a perplexity beyond a double
        low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(value, float(low), float(high))

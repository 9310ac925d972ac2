"""Training curves of one run, or of several runs in shared charts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from finetune.formatting import count, memory
from finetune.report.chart import Axis, Point, Series, chart, smoothed
from finetune.run.events import StepMetrics
from finetune.run.history import History

STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem 2rem; }
.wide { margin-bottom: 1rem; } .wide .plot { height: 18rem; }
.chart { margin: 0; padding-bottom: .6rem; break-inside: avoid; } figcaption { font-weight: 600; font-size: .95rem; }
figcaption small { color: var(--dim); font-weight: 400; }
.key { font-weight: 400; font-size: .85rem; margin-left: 1rem; white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: 1.1em; height: .2em; margin-right: .4em;
  vertical-align: middle; background: var(--color); }
.plot { height: 11rem; margin: 1.6rem .75rem 1.6rem 3.4rem; } .plot > svg { width: 100%; height: 100%; }
.plot svg { display: block; overflow: visible; } .plot text { font-size: .75rem; fill: var(--dim); }
.plot .grid { stroke: var(--line); } .lines path { fill: none; stroke: var(--color); stroke-width: 2;
  vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.plot .faint { opacity: .3; stroke-width: 1.25; } .lines .band { fill: var(--color); stroke: none; opacity: .18; }
.plot circle { fill: var(--color); stroke: var(--back); stroke-width: 1.5; }
.at rect { fill: transparent; } .at > :not(rect) { visibility: hidden; } .at:hover > * { visibility: visible; }
.at line { stroke: var(--dim); stroke-dasharray: 3 3; } .plot .at text { fill: var(--text); }
.c1 { --color: var(--one); } .c2 { --color: var(--two); } .c3 { --color: var(--three); }
.c4 { --color: var(--four); } .c5 { --color: var(--five); } .c6 { --color: var(--six); }
@media print { .at { display: none; } .charts { grid-template-columns: 1fr 1fr; gap: .5rem 1rem; }
  .charts .plot { height: 8rem; } .wide .plot { height: 13rem; } }
"""

COLORS = 6
"""Number of distinct line colours."""


def charts(wide: Sequence[str], rest: Sequence[str]) -> str:
    """Wide figures stacked, the rest side by side if the page is wide enough."""
    groups = (("wide", "".join(wide)), ("charts", "".join(rest)))
    return "".join(f'<div class="{kind}">{figures}</div>' for kind, figures in groups if figures)


def curves(history: History) -> str:
    """Loss, validation loss, learning rate, gradient norm, throughput and memory of one run."""
    loss = _points(history, lambda step: step.loss)
    lines = [
        Series("each step", loss, faint=True),
        Series("training, smoothed", smoothed(loss)),
        Series("validation", _validation(history), color=2, dotted=True),
    ]
    figures = [chart(each.title, [Series(each.title, _points(history, each.of))], each.axis) for each in _FIGURES]
    return charts([chart("Loss, nats per target token", lines, LOSS)], figures)


def compared(histories: Sequence[tuple[str, History]]) -> str:
    """The same for several runs, one colour each; colours repeat beyond `COLORS` runs."""

    def figure(title: str, points_of: Callable[[History], list[Point]], axis: Axis, dotted: bool = False) -> str:
        lines = [
            Series(name, points_of(history), color=1 + index % COLORS, dotted=dotted)
            for index, (name, history) in enumerate(histories)
        ]
        return chart(title, lines, axis)

    losses = [
        figure("Validation loss, nats per target token", _validation, LOSS, dotted=True),
        figure("Training loss, smoothed", lambda each: smoothed(_points(each, lambda step: step.loss)), LOSS),
    ]
    return charts(losses, [figure(each.title, partial(_points, of=each.of), each.axis) for each in _FIGURES])


def _points(history: History, of: Callable[[StepMetrics], float]) -> list[Point]:
    return [(step.step, of(step)) for step in history.steps]


def _validation(history: History) -> list[Point]:
    return [(each.step, each.loss) for each in history.validations]


def _loss(value: float) -> str:
    return f"{value:.3g}" if value < 1 else f"{value:.2f}"


def _rate(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-") if value else "0"


LOSS = Axis(_loss, may_be_logarithmic=True)


class _Figure(NamedTuple):
    """A chart over steps: title, value of a step, and axis."""

    title: str
    of: Callable[[StepMetrics], float]
    axis: Axis


_FIGURES = [
    _Figure("Learning rate", lambda step: step.learning_rate, Axis(_rate, from_zero=True)),
    _Figure(
        "Gradient norm, before clipping",
        lambda step: step.gradient_norm,
        Axis(lambda norm: f"{norm:.3g}", may_be_logarithmic=True),
    ),
    _Figure("Tokens per second", lambda step: step.tokens_per_second, Axis(count, from_zero=True)),
    _Figure("Peak memory", lambda step: step.peak_memory_bytes, Axis(memory, from_zero=True)),
]

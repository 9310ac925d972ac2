"""Line charts as inline SVG whose text keeps its size at any width, without scripts.

Lines are drawn in a box of 1000 by 1000 units that is stretched over the plot, without stretching strokes. Text, dots
and grid are positioned in percent. Tooltips are shown by CSS.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from finetune.formatting import in_html

BOX = 1000
MOST_POINTS = 400
"""Points of a line; more are averaged in groups: the mean is drawn as the line, the range as a band."""

MOST_READINGS = 120
"""Number of x positions with a tooltip."""

LOGARITHMIC_FROM = 30.0
"""Ratio of the largest to the smallest value from which an axis becomes logarithmic, if allowed."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        name: Name in the legend and in tooltips.
        points: (x, y), x ascending; points with a non-finite y are dropped.
        color: Number of its colour, from 1.
        dotted: Draw markers too, for a line of few points.
        faint: A background line, such as the raw values of a smoothed one, without legend and tooltips.
        connected: Draw the line between the points.
    """

    name: str
    points: Sequence[Point]
    color: int = 1
    dotted: bool = False
    faint: bool = False
    connected: bool = True


@dataclass(frozen=True)
class Axis:
    """Format and scale of an axis.

    Attributes:
        words: Formats a value as text.
        may_be_logarithmic: Use a logarithmic axis if the range is wide.
        from_zero: Start the axis at 0.
        name: Name of the quantity, in tooltips.
        integer: Whether values are integers; the axis then ends at the first and last of them.
    """

    words: Callable[[float], str]
    may_be_logarithmic: bool = False
    from_zero: bool = False
    name: str = ""
    integer: bool = False


STEPS = Axis(lambda step: f"{step:.0f}", name="step", integer=True)


def smoothed(points: Sequence[Point]) -> list[Point]:
    """A centred moving average; the window is a thirtieth of all points on either side, and shrinks at the ends.

    A symmetric window keeps the first and the last point exact, and does not lag behind a falling loss.
    """
    finite = [point for point in points if math.isfinite(point[1])]
    sums = [0.0, *accumulate(y for _, y in finite)]
    line = []
    for index, (x, _) in enumerate(finite):
        reach = min(max(1, len(finite) // 30), index, len(finite) - 1 - index)
        line.append((x, (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)))
    return line


def chart(title: str, series: Sequence[Series], axis: Axis, along: Axis = STEPS) -> str:
    """A figure with title, legend and plot; "" if no line has a point.

    Args:
        title: Title of the figure.
        series: The lines; six that are not faint have distinct colours.
        axis: The y axis.
        along: The x axis.
    """
    finite = [replace(s, points=[point for point in s.points if math.isfinite(point[1])]) for s in series]
    drawn = [s for s in finite if s.points]
    if not drawn:
        return ""
    x_axis = _Scale.over([x for s in drawn for x, _ in s.points], along)
    y_axis = _Scale.over([y for s in drawn for _, y in s.points], axis)
    named = [s for s in drawn if not s.faint]
    legend = "".join(f'<span class="key c{s.color}">{in_html(s.name)}</span>' for s in named) if len(named) > 1 else ""
    scale = "<small>logarithmic</small>" if y_axis.logarithmic else ""
    parts = [
        *(
            f'<line class="grid" x2="100%" y1="{100 - at:.2f}%" y2="{100 - at:.2f}%"/>'
            f'<text x="0" dx="-6" y="{100 - at:.2f}%" dy=".32em" text-anchor="end">{in_html(axis.words(tick))}</text>'
            for tick, at in y_axis.ticks()
        ),
        *(
            f'<text x="{at:.2f}%" y="100%" dy="1.35em" text-anchor="middle">{in_html(along.words(tick))}</text>'
            for tick, at in x_axis.ticks()
        ),
        f'<svg class="lines" viewBox="0 0 {BOX} {BOX}" preserveAspectRatio="none">',
        *(_line(s, x_axis, y_axis) for s in drawn if s.connected),
        "</svg>",
        *(_dots(s, x_axis, y_axis) for s in drawn if s.dotted),
        _readings(named, x_axis, axis.words, along),
    ]
    last = ", ".join(f"{s.name} {axis.words(s.points[-1][1])}" for s in named)
    return (
        f'<figure class="chart"><figcaption>{in_html(title)} {scale}{legend}</figcaption>\n'
        f'<div class="plot"><svg role="img" aria-label="{in_html(f"{title} by {along.name}; last: {last}")}">\n'
        + "\n".join(parts)
        + "\n</svg></div></figure>"
    )


@dataclass(frozen=True)
class _Scale:
    """Maps values to percent of the plot; on a logarithmic scale `low` and `high` are logarithms."""

    low: float
    high: float
    logarithmic: bool
    integer: bool

    @classmethod
    def over(cls, values: Sequence[float], axis: Axis) -> _Scale:
        low, high = min(values), max(values)
        is_logarithmic = axis.may_be_logarithmic and low > 0 and high > LOGARITHMIC_FROM * low
        if is_logarithmic:
            low, high = math.log10(low), math.log10(high)
        low = min(0.0, low) if axis.from_zero else low
        room = 0 if axis.integer else 0.05 * (high - low)
        return cls(low if axis.from_zero else low - room, high + room, is_logarithmic, axis.integer)

    def at(self, value: float) -> float:
        """The position of a value on the axis, in percent."""
        place = math.log10(value) if self.logarithmic else value
        return 100 * (place - self.low) / (self.high - self.low) if self.high > self.low else 50.0

    def ticks(self) -> list[tuple[float, float]]:
        """Round values and their positions in percent."""
        return [(tick, self.at(tick)) for tick in (self._decades() if self.logarithmic else self._round())]

    def _round(self) -> list[float]:
        if self.high <= self.low:
            return [self.low]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        stride = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
        stride = max(1.0, stride) if self.integer else stride
        first = math.ceil(self.low / stride - 1e-9)
        return [stride * n for n in range(first, first + 12) if stride * n <= self.high + 1e-9 * stride]

    def _decades(self) -> list[float]:
        decades = self.high - self.low
        factors = (1, 2, 5) if decades < 1.8 else (1, 3) if decades < 3.5 else (1,)
        stride = max(1, round(decades / 8))
        powers = range(max(-300, math.floor(self.low)), min(300, math.floor(self.high)) + 1, stride)
        exponents = [(factor, power) for power in powers for factor in factors]
        return [f * 10.0**p for f, p in exponents if self.low - 1e-9 <= math.log10(f) + p <= self.high + 1e-9]


def _line(series: Series, x_axis: _Scale, y_axis: _Scale) -> str:
    """The path of a line; of very many points the means of groups, over a band of their ranges."""
    stride = -(-len(series.points) // MOST_POINTS)
    groups = [series.points[first : first + stride] for first in range(0, len(series.points), stride)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    kind = f"c{series.color}" + (" faint" if series.faint else "")
    path = f'<path class="{kind}" d="M{_places(means, x_axis, y_axis)}"/>'
    if stride == 1:
        return path
    upper = [(x, max(y for _, y in group)) for (x, _), group in zip(means, groups, strict=True)]
    lower = [(x, min(y for _, y in group)) for (x, _), group in zip(means, groups, strict=True)]
    outline = _places([*upper, *reversed(lower)], x_axis, y_axis)
    return f'<path class="c{series.color} band" d="M{outline}Z"/>{path}'


def _places(points: Sequence[Point], x_axis: _Scale, y_axis: _Scale) -> str:
    return "L".join(f"{BOX / 100 * x_axis.at(x):.1f} {BOX - BOX / 100 * y_axis.at(y):.1f}" for x, y in points)


def _dots(series: Series, x_axis: _Scale, y_axis: _Scale) -> str:
    stride = -(-len(series.points) // MOST_READINGS)
    radius = 3 if series.connected else 4.5
    return "".join(
        f'<circle class="c{series.color}" cx="{x_axis.at(x):.2f}%" cy="{100 - y_axis.at(y):.2f}%" r="{radius}"/>'
        for x, y in series.points[::stride]
    )


def _readings(series: Sequence[Series], x_axis: _Scale, words: Callable[[float], str], along: Axis) -> str:
    """Invisible strips side by side; the hovered one shows a vertical line and, above the plot, the values."""
    every_x = sorted({x for s in series for x, _ in s.points})
    stride = -(-len(every_x) // MOST_READINGS)
    shown = every_x[::stride]
    ats = [x_axis.at(x) for x in shown]
    edges = [0.0, *((left + right) / 2 for left, right in pairwise(ats)), 100.0]
    strips = []
    for index, (x, at) in enumerate(zip(shown, ats, strict=True)):
        values = [
            f"{s.name} {words(y)}" if len(series) > 1 else words(y)
            for s in series
            if (y := _value_at(s, x, stride)) is not None
        ]
        text = in_html(f"{along.name} {along.words(x)}: {', '.join(values)}")
        strips.append(
            f'<g class="at"><rect x="{edges[index]:.2f}%" width="{edges[index + 1] - edges[index]:.2f}%" '
            f'height="100%"/><line x1="{at:.2f}%" x2="{at:.2f}%" y2="100%"/>'
            f'<text x="100%" dy="-.5em" text-anchor="end">{text}</text></g>'
        )
    return "".join(strips)


def _value_at(series: Series, x: float, stride: int) -> float | None:
    """The value of a line at x, or the next one if tooltips are sparse; None if there is none."""
    place = bisect_left(series.points, x, key=lambda point: point[0])
    if place < len(series.points) and series.points[place][0] < x + stride:
        return series.points[place][1]
    return None

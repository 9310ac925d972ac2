"""The panel below the progress bar of a training: figures of the last step, the loss curve and the last sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from finetune.run.events import Event, SampleGenerated, StepMetrics, TrainingStarted, ValidationResult

from .formatting import sample_lines, step_figures

HEIGHT = 6
"""Lines of the loss curve."""

MIN_TERMINAL_HEIGHT = 16
"""The loss curve is hidden in terminals with fewer lines."""

MAX_WIDTH = 72
LABEL_WIDTH = 8
MAX_MEANS = 2000
"""Points of the loss curve; a longer curve is halved by averaging neighbours."""

LOGARITHMIC_FROM = 30.0
"""Ratio of largest to smallest loss above which the axis is logarithmic."""

# Bits of the dots of a braille character by column and row, from the top left (Unicode block U+2800).
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
EMPTY = 0x2800


class Losses:
    """The loss curve in at most MAX_MEANS points: when these are full, pairs of neighbours are averaged."""

    def __init__(self) -> None:
        self.means: list[float] = []
        self.first_step = 1
        self.stride = 1
        self._pending: list[float] = []

    def add(self, event: StepMetrics) -> None:
        """Add the loss of the next step."""
        if not self.means and not self._pending:
            self.first_step = event.step
        self._pending.append(event.loss)
        if len(self._pending) == self.stride:
            self.means.append(sum(self._pending) / self.stride)
            self._pending.clear()
        if len(self.means) == MAX_MEANS:
            self.means = [(left + right) / 2 for left, right in zip(self.means[::2], self.means[1::2], strict=True)]
            self.stride *= 2

    def position(self, step: int) -> float:
        """Position of a step on the curve, from 0 at the first to 1 at the last."""
        last = self.first_step + max(1, len(self.means) * self.stride - 1)
        return (step - self.first_step) / (last - self.first_step)


class LivePanel:
    """Collects events; a rich renderable."""

    def __init__(self) -> None:
        self.losses = Losses()
        self.validations: list[ValidationResult] = []
        self.step: StepMetrics | None = None
        self.planned_bytes: int | None = None
        self.sample: SampleGenerated | None = None

    def update(self, event: Event) -> None:
        """Add an event; most kinds are not shown here."""
        match event:
            case TrainingStarted():
                self.planned_bytes = event.planned_memory_bytes
            case StepMetrics():
                self.losses.add(event)
                self.step = event
            case ValidationResult():
                self.validations.append(event)
            case SampleGenerated() if self.sample is None or event.step > self.sample.step:
                self.sample = event  # the first of several, so that the same row is compared during the run

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The lines of the panel that fit into the terminal."""
        if self.step is None:
            return
        yield _line(step_figures(self.step, self.validations, self.planned_bytes), options.max_width)
        if console.height >= MIN_TERMINAL_HEIGHT and len(self.losses.means) > 1:
            yield from curve(self.losses, self.validations, min(options.max_width, MAX_WIDTH))
        if self.sample is not None:
            answer, reference = sample_lines(self.sample)
            yield _line(answer, options.max_width)
            yield _line(reference, options.max_width, "dim")


def curve(losses: Losses, validations: Sequence[ValidationResult], width: int) -> list[Text]:
    """The loss curve in braille dots with validation losses as circles, `width` characters wide."""
    columns = 2 * (width - LABEL_WIDTH)
    line = _resampled(losses.means, columns)
    shown = [each for each in validations if each.step >= losses.first_step and math.isfinite(each.loss)]
    values = [*line, *(each.loss for each in shown)]
    low, high = min(values), max(values)
    scale = math.log if 0 < LOGARITHMIC_FROM * low < high else float

    def row(value: float) -> int:
        """Row of dots from the top."""
        fraction = (scale(value) - scale(low)) / (scale(high) - scale(low)) if high > low else 0.5
        return round((1 - fraction) * (4 * HEIGHT - 1))

    cells = [[EMPTY] * (width - LABEL_WIDTH) for _ in range(HEIGHT)]
    before = row(line[0])
    for column, value in enumerate(line):
        current = row(value)
        for dot in range(min(before, current), max(before, current) + 1):
            cells[dot // 4][column // 2] |= DOTS[column % 2][dot % 4]
        before = current
    circles = {
        (row(each.loss) // 4, round(losses.position(each.step) * (width - LABEL_WIDTH - 1)))
        for each in shown
        if losses.position(each.step) <= 1
    }
    labels = {0: f"{high:.3g}", HEIGHT - 1: f"{low:.3g}"}
    drawn = []
    for number, line_cells in enumerate(cells):
        text = Text(f"{labels.get(number, ''):>{LABEL_WIDTH - 1}} ", style="dim", no_wrap=True)
        for index, cell in enumerate(line_cells):
            is_circle = (number, index) in circles
            text.append("●" if is_circle else chr(cell), style="not dim yellow" if is_circle else "not dim cyan")
        drawn.append(text)
    return drawn


def _resampled(values: Sequence[float], columns: int) -> list[float]:
    """One value per column: the mean of its values, or an interpolated one if there are fewer values than columns."""
    if len(values) >= columns:
        edges = [index * len(values) // columns for index in range(columns + 1)]
        return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    positions = [index * (len(values) - 1) / (columns - 1) for index in range(columns)]
    lefts = [min(int(position), len(values) - 2) for position in positions]
    return [
        values[left] + (position - left) * (values[left + 1] - values[left])
        for position, left in zip(positions, lefts, strict=True)
    ]


def _line(text: str, width: int, style: str = "") -> Text:
    """One line, cut at the width of the terminal."""
    line = Text(" ".join(text.split("\n")) if "\n" in text else text, style=style, no_wrap=True, overflow="ellipsis")
    line.truncate(width, overflow="ellipsis")
    return line

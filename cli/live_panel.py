"""What one watches while a run trains: the figures of the last step, a small curve of the loss, the last answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from finetune.run.events import Event, SampleGenerated, StepMetrics, TrainingStarted, ValidationResult

from . import formatting
from .sanitize import sanitize

HEIGHT = 6
"""Lines of the curve."""

LEAST_HEIGHT = 16
"""Lines of a terminal below which there is no room for a curve."""

WIDEST = 72
LABELS = 8
MOST_MEANS = 2000
"""Numbers that the curve is drawn from; beyond, neighbours are put together."""

LOGARITHMIC_FROM = 30.0
"""Ratio of largest to smallest loss from which the curve is logarithmic."""

# Dots of a braille letter by column and row, from the top left (Unicode block U+2800).
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
EMPTY = 0x2800


class Losses:
    """Means of the losses so far, few enough to draw at once however long the run is."""

    def __init__(self) -> None:
        self.means: list[float] = []
        self.first_step = 1
        self.stride = 1
        self._waiting: list[float] = []

    def add(self, event: StepMetrics) -> None:
        """Take the loss of the next step."""
        if not self.means and not self._waiting:
            self.first_step = event.step
        self._waiting.append(event.loss)
        if len(self._waiting) == self.stride:
            self.means.append(sum(self._waiting) / self.stride)
            self._waiting.clear()
        if len(self.means) == MOST_MEANS:
            self.means = [(left + right) / 2 for left, right in zip(self.means[::2], self.means[1::2], strict=True)]
            self.stride *= 2

    def place(self, step: int) -> float:
        """Where a step stands among the means, from 0 at the first to 1 at the last."""
        last = self.first_step + max(1, len(self.means) * self.stride - 1)
        return (step - self.first_step) / (last - self.first_step)


class LivePanel:
    """Follows events, and is drawn by rich."""

    def __init__(self) -> None:
        self.losses = Losses()
        self.validations: list[ValidationResult] = []
        self.step: StepMetrics | None = None
        self.planned_bytes: int | None = None
        self.sample: SampleGenerated | None = None

    def see(self, event: Event) -> None:
        """Take an event; most say nothing that is shown here."""
        match event:
            case TrainingStarted():
                self.planned_bytes = event.planned_memory_bytes
            case StepMetrics():
                self.losses.add(event)
                self.step = event
            case ValidationResult():
                self.validations.append(event)
            case SampleGenerated() if self.sample is None or event.step > self.sample.step:
                self.sample = event  # of several the first, to compare with itself as the run goes on

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The lines that fit on the terminal."""
        if self.step is None:
            return
        yield _line(formatting.figures(self.step, self.validations, self.planned_bytes), options.max_width)
        if console.height >= LEAST_HEIGHT and len(self.losses.means) > 1:
            yield from curve(self.losses, self.validations, min(options.max_width, WIDEST))
        if self.sample is not None:
            said = f"answer after step {self.sample.step}: {sanitize(self.sample.answer)}"
            yield _line(said, options.max_width)
            yield _line(f"it should have been: {sanitize(self.sample.reference)}", options.max_width, "dim")


def curve(losses: Losses, validations: Sequence[ValidationResult], width: int) -> list[Text]:
    """Losses as dots in braille, the held-out ones among them as circles; as many letters wide as `width`."""
    columns = 2 * (width - LABELS)
    line = _resampled(losses.means, columns)
    shown = [each for each in validations if each.step >= losses.first_step and math.isfinite(each.loss)]
    values = [*line, *(each.loss for each in shown)]
    low, high = min(values), max(values)
    scale = math.log if 0 < LOGARITHMIC_FROM * low < high else float

    def row(value: float) -> int:
        """From the top, in dots."""
        share = (scale(value) - scale(low)) / (scale(high) - scale(low)) if high > low else 0.5
        return round((1 - share) * (4 * HEIGHT - 1))

    letters = [[EMPTY] * (width - LABELS) for _ in range(HEIGHT)]
    before = row(line[0])
    for column, value in enumerate(line):
        at = row(value)
        for dot in range(min(before, at), max(before, at) + 1):
            letters[dot // 4][column // 2] |= DOTS[column % 2][dot % 4]
        before = at
    circles = {
        (row(each.loss) // 4, round(losses.place(each.step) * (width - LABELS - 1)))
        for each in shown
        if losses.place(each.step) <= 1
    }
    labels = {0: f"{high:.3g}", HEIGHT - 1: f"{low:.3g}"}
    drawn = []
    for number, found in enumerate(letters):
        text = Text(f"{labels.get(number, ''):>{LABELS - 1}} ", style="dim", no_wrap=True)
        for index, letter in enumerate(found):
            is_circle = (number, index) in circles
            text.append("●" if is_circle else chr(letter), style="not dim yellow" if is_circle else "not dim cyan")
        drawn.append(text)
    return drawn


def _resampled(values: Sequence[float], columns: int) -> list[float]:
    """A value for each column: the mean of those that fall into it, or what lies on the line between two."""
    if len(values) >= columns:
        edges = [index * len(values) // columns for index in range(columns + 1)]
        return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    places = [index * (len(values) - 1) / (columns - 1) for index in range(columns)]
    lefts = [min(int(place), len(values) - 2) for place in places]
    return [
        values[left] + (place - left) * (values[left + 1] - values[left])
        for place, left in zip(places, lefts, strict=True)
    ]


def _line(text: str, width: int, style: str = "") -> Text:
    """One line, cut where the terminal ends."""
    line = Text(" ".join(text.split("\n")) if "\n" in text else text, style=style, no_wrap=True, overflow="ellipsis")
    line.truncate(width, overflow="ellipsis")
    return line

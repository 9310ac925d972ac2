"""The live panel: lines that fit into the terminal, and the position of the loss curve."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from cli.live_panel import EMPTY, HEIGHT, MAX_MEANS, LivePanel, Losses, curve
from finetune.run.events import Event, SampleGenerated, ValidationResult
from tests.fixtures.runs import steps

from .test_formatting import STARTED


def shown(*events: Event, width: int = 80, height: int = 40) -> list[str]:
    panel = LivePanel()
    for event in events:
        panel.update(event)
    stream = StringIO()
    Console(file=stream, width=width, height=height, color_system=None).print(panel)
    return stream.getvalue().splitlines()


def dots(lines: list[str]) -> list[int]:
    """The topmost line with dots, per column of characters; -1 for an empty column."""
    found = []
    for column in range(8, max(map(len, lines))):
        rows = [row for row, line in enumerate(lines) if ord(line.ljust(80)[column]) > EMPTY]
        found.append(rows[0] if rows else -1)
    return found


def test_panel_before_the_first_step_is_empty():
    assert shown(ValidationResult(0, 2.0, 7.4, 5)) == []


def test_curve_of_a_falling_loss_descends():
    figures, *drawn = shown(*steps([4.0, 3.0, 2.0, 1.0]))
    assert figures.startswith("loss 1.0000  grad 0.25")
    assert len(drawn) == HEIGHT
    places = dots(drawn)
    assert places[0] == 0
    assert places[-1] == HEIGHT - 1
    assert places == sorted(places)
    assert drawn[0].split()[0] == "4"
    assert drawn[-1].split()[0] == "1"


def test_curve_shows_validation_losses_as_circles_at_their_steps():
    curve_steps = steps([4.0, 3.0, 2.0, 1.0])
    figures, *drawn = shown(
        *curve_steps[:2], ValidationResult(2, 4.0, 1.0, 5), *curve_steps[2:], ValidationResult(4, 1.0, 1.0, 5)
    )
    assert "validation 1.0000" in figures
    assert "".join(drawn).count("●") == 2
    assert drawn[-1].rstrip()[-1] == "●"
    assert drawn[0].index("●") == 8 + round((72 - 8 - 1) / 3)


def test_memory_is_compared_with_the_estimate_if_there_is_one():
    curve_steps = steps([2.0, 1.0])
    measured = ValidationResult(1, 4.0, 1.0, 5)
    figures, *_ = shown(replace(STARTED, planned_memory_bytes=1_640_000_000), measured, *curve_steps)
    assert figures.endswith("1.0 of 1.6 GB estimated")
    figures, *_ = shown(STARTED, measured, *curve_steps)
    assert figures.endswith("1.0 GB")


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("height", [5, 16, 50])
def test_panel_fits_into_the_terminal(width: int, height: int):
    sample = SampleGenerated(3, "prompt", "an answer\nin two lines " * 9, "another")
    lines = shown(*steps([4.0, 3.0, 2.0]), sample, width=width, height=height)
    assert all(len(line) <= width for line in lines)
    assert len(lines) == (3 if height < 16 else 3 + HEIGHT)


def test_sample_loses_control_characters():
    lines = shown(*steps([1.0]), SampleGenerated(1, "", "\x1b[2J\x1b[31mred", "\x07"))
    assert "\x1b" not in "".join(lines)
    assert "\x07" not in "".join(lines)


def test_panel_shows_the_first_sample_of_the_last_step():
    samples = [SampleGenerated(step, prompt, f"{prompt}{step}", "") for step in (1, 2) for prompt in "ab"]
    assert "a2" in "\n".join(shown(*steps([1.0, 1.0]), *samples))


@pytest.mark.parametrize("losses", [[0.0, 0.0], [1.0, 1.0], [1e-30, 1e30], [-1.0, 5.0]], ids=str)
def test_curve_draws_constant_huge_and_negative_ranges(losses: list[float]):
    assert len(shown(*steps(losses))) == 1 + HEIGHT


def test_losses_of_a_long_run_are_averaged_to_a_bounded_number_of_points():
    losses = Losses()
    (first,) = steps([0.0])
    count = 3 * MAX_MEANS + 7
    for step in range(1, count + 1):
        losses.add(replace(first, step=step, loss=float(step)))
    assert len(losses.means) < MAX_MEANS
    assert losses.means[0] == pytest.approx(losses.stride / 2 + 0.5)
    assert losses.means == sorted(losses.means)
    assert losses.position(1) == 0
    assert losses.position(count) == pytest.approx(1, abs=0.01)
    assert len(curve(losses, [], 72)) == HEIGHT

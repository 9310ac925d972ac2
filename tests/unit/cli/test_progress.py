"""Displays of the same events on a terminal, in a pipe and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from unittest.mock import Mock

import pytest
from rich.console import Console

from cli.progress import JsonLines, Lines, Live, ProgressDisplay, Silent
from finetune.run.events import BestCheckpoint, Event, Phase, Progress, TrainingWarning, ValidationResult

from .test_formatting import FINISHED, STARTED, STEP

VALIDATED = ValidationResult(step=10, loss=1.25, perplexity=3.49, rows=50)
ONE_OF_EACH: list[Event] = [Phase("saving"), STARTED, STEP, VALIDATED, Progress("answering", 8, 8), FINISHED]


def lines_for(total_steps: int) -> list[str]:
    stream = StringIO()
    display = Lines(stream)
    for step in range(1, total_steps + 1):
        display.event(replace(STEP, step=step, total_steps=total_steps))
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("total_steps", [1, 7, 100])
def test_lines_show_every_step_of_a_short_training(total_steps: int):
    assert len(lines_for(total_steps)) == total_steps


@pytest.mark.parametrize("total_steps", [101, 250, 99_999])
def test_lines_show_about_a_hundred_steps_of_a_long_training(total_steps: int):
    lines = lines_for(total_steps)
    assert 50 <= len(lines) <= 102
    assert lines[0].startswith(f"step 1/{total_steps} ")
    assert lines[-1].startswith(f"step {total_steps}/{total_steps} ")


def test_lines_show_events_and_remarks_in_order():
    stream = StringIO()
    display = Lines(stream)
    display.event(Phase("reading the data"))
    display.note("warning: dropped 2 rows")
    display.event(VALIDATED)
    display.close()
    first, second, third = stream.getvalue().splitlines()
    assert (first, second) == ("reading the data ...", "warning: dropped 2 rows")
    assert third.startswith("validation loss 1.2500")


def test_silent_display_shows_remarks_only():
    stream = StringIO()
    display = Silent(stream)
    for event in ONE_OF_EACH:
        display.event(event)
    display.note("warning: dropped 2 rows")
    assert stream.getvalue() == "warning: dropped 2 rows\n"


WARNED = TrainingWarning(step=7, what="the loss does not fall: 2.0 before, 2.0 since", hint="raise the rate")


@pytest.mark.parametrize("kind", [Silent, Lines])
def test_training_warnings_are_shown_without_a_terminal_even_if_silent(kind: type[Silent]):
    stream = StringIO()
    kind(stream).event(WARNED)
    assert stream.getvalue() == "warning: step 7: the loss does not fall: 2.0 before, 2.0 since\n  -> raise the rate\n"


def test_live_display_keeps_warnings_and_best_checkpoint_and_leaves_the_panel():
    best = BestCheckpoint(step=9, best_step=6, loss=1.5, stopped_early=True)
    display, stream = terminal()
    shown(display, stream, STEP, WARNED, best)
    assert "warning: step 7: the loss does not fall" in stream.getvalue()
    best_line = "best checkpoint: step 6 with the lowest validation loss 1.5000, and training stopped early"
    assert best_line in stream.getvalue()
    assert stream.getvalue().rstrip().endswith("2.5 GB")  # the panel's figures come last


def test_json_lines_have_every_event_with_all_fields_and_no_remarks():
    output, errors = StringIO(), StringIO()
    display = JsonLines(output, errors)
    for event in ONE_OF_EACH:
        display.event(event)
        display.note("note: something")
    records = [json.loads(line) for line in output.getvalue().splitlines()]
    assert records == [event.to_json() for event in ONE_OF_EACH]
    assert [record["event"] for record in records] == [
        "phase",
        "started",
        "step",
        "validation",
        "progress",
        "finished",
    ]
    assert errors.getvalue() == "note: something\n" * len(ONE_OF_EACH)


def terminal() -> tuple[Live, StringIO]:
    stream = StringIO()
    return Live(Console(file=stream, force_terminal=True, width=160, color_system=None, legacy_windows=False)), stream


def shown(display: ProgressDisplay, stream: StringIO, *events: Event) -> str:
    for event in events:
        display.event(event)
    if isinstance(display, Live):
        display.bar.refresh()
    text = stream.getvalue()
    display.close()
    return text


def test_live_display_shows_step_figures_and_time_left():
    text = shown(*terminal(), STEP)
    assert "training" in text
    assert "10/60" in text
    assert "loss 1.2346" in text
    assert "1:40 left" in text


def test_live_display_keeps_start_and_validation_and_erases_the_progress_bar():
    display, stream = terminal()
    shown(display, stream, *ONE_OF_EACH)
    after_close = stream.getvalue().rsplit("answering", 1)[-1]
    assert "\x1b[2K" in after_close  # the line is erased
    assert "run directory: runs/tickets" in stream.getvalue()
    assert "validation loss 1.2500" in stream.getvalue()


def test_time_left_excludes_work_done_before_the_first_event(monkeypatch: pytest.MonkeyPatch):
    clock = iter([100.0, 130.0, 160.0])
    monkeypatch.setattr("cli.progress.time", Mock(monotonic=lambda: next(clock)))
    display, _ = terminal()
    figures = []
    for done in (8, 16, 32):  # 8 were cached
        display.event(Progress("answering", done, 64))
        figures.append(display.bar.tasks[0].fields["figures"])
    display.close()
    assert figures == ["", "3:00 left", "1:20 left"]


def test_live_display_shows_one_phase_at_a_time():
    display, stream = terminal()
    shown(display, stream, Phase("reading the data"), Progress("answering", 1, 8), Phase("saving"))
    assert len(display.bar.tasks) == 1
    assert display.bar.tasks[0].description == "saving"
    assert display.bar.tasks[0].total is None


@pytest.mark.parametrize("name", ["data/[old]/rows.jsonl", "x[/dim]y", "[red]", "a[/]b"])
def test_live_display_does_not_read_brackets_as_markup(name: str):
    display, stream = terminal()
    display.note(f"warning: {name}")
    text = shown(display, stream, Phase(f"loading {name}"), replace(STARTED, run_directory=name))
    assert f"warning: {name}" in text
    assert f"loading {name}" in text
    assert f"run directory: {name}" in text

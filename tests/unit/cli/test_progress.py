"""The same events on a terminal, in a pipe and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from unittest.mock import Mock

import pytest
from rich.console import Console

from cli.progress import Follower, JsonLines, Lines, Live, Silent
from finetune.run.events import BestCheckpoint, Event, Phase, Progress, TrainingWarning, ValidationResult

from .test_formatting import FINISHED, STARTED, STEP

VALIDATED = ValidationResult(step=10, loss=1.25, perplexity=3.49, rows=50)
ONE_OF_EACH: list[Event] = [Phase("saving"), STARTED, STEP, VALIDATED, Progress("answering", 8, 8), FINISHED]


def lines_for(total_steps: int) -> list[str]:
    stream = StringIO()
    follower = Lines(stream)
    for step in range(1, total_steps + 1):
        follower.event(replace(STEP, step=step, total_steps=total_steps))
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("total_steps", [1, 7, 100])
def test_every_step_of_a_short_training_has_its_line(total_steps: int):
    assert len(lines_for(total_steps)) == total_steps


@pytest.mark.parametrize("total_steps", [101, 250, 99_999])
def test_of_a_long_training_about_a_hundred_steps_are_shown_the_first_and_last_among_them(total_steps: int):
    lines = lines_for(total_steps)
    assert 50 <= len(lines) <= 102
    assert lines[0].startswith(f"step 1/{total_steps} ")
    assert lines[-1].startswith(f"step {total_steps}/{total_steps} ")


def test_lines_tell_events_and_remarks_in_order():
    stream = StringIO()
    follower = Lines(stream)
    follower.event(Phase("reading the data"))
    follower.note("warning: left out 2 rows")
    follower.event(VALIDATED)
    follower.close()
    first, second, third = stream.getvalue().splitlines()
    assert (first, second) == ("reading the data ...", "warning: left out 2 rows")
    assert third.startswith("held-out loss 1.2500")


def test_silence_is_broken_by_remarks_only():
    stream = StringIO()
    follower = Silent(stream)
    for event in ONE_OF_EACH:
        follower.event(event)
    follower.note("warning: left out 2 rows")
    assert stream.getvalue() == "warning: left out 2 rows\n"


WARNED = TrainingWarning(step=7, what="the loss does not fall: 2.0 before, 2.0 since", hint="raise the rate")


@pytest.mark.parametrize("kind", [Silent, Lines])
def test_what_is_worth_acting_on_is_told_even_where_all_else_is_silent(kind: type[Silent]):
    stream = StringIO()
    kind(stream).event(WARNED)
    assert stream.getvalue() == "warning: step 7: the loss does not fall: 2.0 before, 2.0 since\n  -> raise the rate\n"


def test_a_terminal_keeps_warnings_and_which_weights_are_the_result_and_leaves_the_board():
    best = BestCheckpoint(step=9, best_step=6, loss=1.5, stopped_early=True)
    follower, stream = terminal()
    shown(follower, stream, STEP, WARNED, best)
    assert "warning: step 7: the loss does not fall" in stream.getvalue()
    kept = "the weights of step 6 are kept: held-out loss 1.5000, the lowest, and training stopped early"
    assert kept in stream.getvalue()
    assert stream.getvalue().rstrip().endswith("2.5 GB")  # the board's figures, below all


def test_json_has_every_event_whole_and_no_remark():
    output, errors = StringIO(), StringIO()
    follower = JsonLines(output, errors)
    for event in ONE_OF_EACH:
        follower.event(event)
        follower.note("note: something")
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


def shown(follower: Follower, stream: StringIO, *events: Event) -> str:
    for event in events:
        follower.event(event)
    if isinstance(follower, Live):
        follower.display.refresh()
    text = stream.getvalue()
    follower.close()
    return text


def test_a_terminal_shows_the_step_with_its_figures_and_the_time_left():
    text = shown(*terminal(), STEP)
    assert "training" in text
    assert "10/60" in text
    assert "loss 1.2346" in text
    assert "1:40 left" in text


def test_a_terminal_keeps_start_and_validation_and_takes_the_moving_line_away():
    follower, stream = terminal()
    shown(follower, stream, *ONE_OF_EACH)
    after_close = stream.getvalue().rsplit("answering", 1)[-1]
    assert "\x1b[2K" in after_close  # the line is erased
    assert "run directory: runs/tickets" in stream.getvalue()
    assert "held-out loss 1.2500" in stream.getvalue()


def test_what_can_be_counted_has_an_estimate_by_its_own_pace(monkeypatch: pytest.MonkeyPatch):
    clock = iter([100.0, 130.0, 160.0])
    monkeypatch.setattr("cli.progress.time", Mock(monotonic=lambda: next(clock)))
    follower, _ = terminal()
    figures = []
    for done in (8, 16, 32):  # 8 were there already
        follower.event(Progress("answering", done, 64))
        figures.append(follower.display.tasks[0].fields["figures"])
    follower.close()
    assert figures == ["", "3:00 left", "1:20 left"]


def test_each_phase_replaces_the_one_before():
    follower, stream = terminal()
    shown(follower, stream, Phase("reading the data"), Progress("answering", 1, 8), Phase("saving"))
    assert len(follower.display.tasks) == 1
    assert follower.display.tasks[0].description == "saving"
    assert follower.display.tasks[0].total is None


@pytest.mark.parametrize("name", ["data/[old]/rows.jsonl", "x[/dim]y", "[red]", "a[/]b"])
def test_brackets_are_shown_as_they_are(name: str):
    follower, stream = terminal()
    follower.note(f"warning: {name}")
    text = shown(follower, stream, Phase(f"loading {name}"), replace(STARTED, run_directory=name))
    assert f"warning: {name}" in text
    assert f"loading {name}" in text
    assert f"run directory: {name}" in text

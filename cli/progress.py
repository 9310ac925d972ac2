"""Displays of a running job: live on a terminal, lines in a pipe, JSON for programs."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Task, TaskID, TextColumn
from rich.progress import Progress as LiveProgress
from rich.table import Column
from rich.text import Text

from finetune.formatting import counted, duration
from finetune.run.events import (
    BestCheckpoint,
    DataRead,
    Event,
    Phase,
    Progress,
    RunResumed,
    StepMetrics,
    TrainingStarted,
    TrainingWarning,
    ValidationResult,
)

from .formatting import event_line, step_pace
from .live_panel import LivePanel


class ProgressDisplay(ABC):
    """Shows events and remarks while a job runs."""

    @abstractmethod
    def event(self, event: Event) -> None:
        """Show an event."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Show a remark, such as a warning."""

    def close(self) -> None:
        """End the display."""
        return None


class Silent(ProgressDisplay):
    """Shows remarks only."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def event(self, event: Event) -> None:
        """Show training warnings; they call for an action even with `--quiet`."""
        if isinstance(event, TrainingWarning):
            self.note(str(event_line(event)))

    def note(self, text: str) -> None:
        """Write a line."""
        self.stream.write(text + "\n")


class Lines(Silent):
    """One line per event, for pipes and log files; about a hundred steps of a long training are shown."""

    shown_steps = 100

    def event(self, event: Event) -> None:
        """Write the line of an event; most steps of a long training have none."""
        if isinstance(event, StepMetrics) and not self._is_shown(event):
            return
        if (text := event_line(event)) is not None:
            self.stream.write(text + "\n")
            self.stream.flush()

    def _is_shown(self, event: StepMetrics) -> bool:
        stride = -(-event.total_steps // self.shown_steps)
        return event.step % stride == 0 or event.step in (1, event.total_steps)


class JsonLines(Silent):
    """One JSON object per line on standard output; remarks go to standard error."""

    def __init__(self, output: TextIO, errors: TextIO) -> None:
        super().__init__(errors)
        self.output = output

    def event(self, event: Event) -> None:
        """Write the event with all its fields."""
        self.output.write(json.dumps(event.to_json()) + "\n")
        self.output.flush()


class CountColumn(MofNCompleteColumn):
    """`8/60`; empty for a task without a total."""

    def render(self, task: Task) -> Text:
        """The count of a task."""
        return super().render(task) if task.total is not None else Text()


class ProgressBar(LiveProgress):
    """A progress bar with the live panel below it."""

    def __init__(self, panel: LivePanel, console: Console) -> None:
        self.panel = panel
        super().__init__(
            TextColumn("{task.description}", style="cyan", markup=False),
            BarColumn(bar_width=24),
            CountColumn(table_column=Column(no_wrap=True, min_width=7)),  # not cut on a narrow terminal
            TextColumn("{task.fields[figures]}", style="dim", markup=False),
            console=console,
            transient=True,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """Renderables that rich draws several times a second."""
        yield self.make_tasks_table(self.tasks)
        yield self.panel


PRINTED_STYLES: dict[type[Event], str | None] = {
    DataRead: "dim",
    TrainingStarted: "dim",
    RunResumed: "dim",
    ValidationResult: None,
    BestCheckpoint: None,
    TrainingWarning: "yellow",
}
"""Events that stay on the terminal, printed above the progress bar, and their styles."""


class Live(ProgressDisplay):
    """A progress bar and the live panel on a terminal; lasting lines are printed above them."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.panel = LivePanel()
        self.bar = ProgressBar(self.panel, console)
        self.bar.start()
        self.task: TaskID | None = None
        self.description = ""
        self.first_seen = (0.0, 0)

    def event(self, event: Event) -> None:
        """Move the progress bar, or print above it."""
        self.panel.update(event)
        match event:
            case Phase():
                self._show(event.doing, total=None)
            case StepMetrics():
                self._show("training", event.total_steps, event.step, step_pace(event))
            case Progress():
                self._show(event.doing, event.total, event.done, self._time_left(event))
            case _ if type(event) in PRINTED_STYLES:
                self._print(event_line(event), PRINTED_STYLES[type(event)])

    def _time_left(self, event: Progress) -> str:
        """Remaining time at the pace since the first event of this task; the count if the total is unknown."""
        if event.total is None:
            return counted(event.done, event.unit.removesuffix("s"))
        if event.doing != self.description:
            # Work that an earlier call had done already (cached answers) must not count as progress of this one.
            self.first_seen = (time.monotonic(), event.done)
        since, before = self.first_seen
        if event.done == before:
            return ""
        pace = (time.monotonic() - since) / (event.done - before)
        return f"{duration(pace * (event.total - event.done))} left"

    def note(self, text: str) -> None:
        """Print above the progress bar."""
        self._print(text, style="yellow")

    def close(self) -> None:
        """Remove the progress bar, and leave the panel."""
        self.bar.stop()
        self.console.print(self.panel)

    def _print(self, text: str | None, style: str | None = None) -> None:
        # Without markup: rich would read a path such as data/[old] as a style tag.
        self.console.print(text, style=style, markup=False, highlight=False)

    def _show(self, description: str, total: int | None, done: int = 0, figures: str = "") -> None:
        if self.task is None or description != self.description:
            if self.task is not None:
                self.bar.remove_task(self.task)  # `update` ignores total=None, so a task keeps its total
            self.task = self.bar.add_task(description, total=total, figures=figures)
            self.description = description
        self.bar.update(self.task, total=total, completed=done, figures=figures)

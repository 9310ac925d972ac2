"""Following a job: a live display on a terminal, lines in a pipe, JSON for programs."""

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

from finetune.formatting import duration
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

from . import formatting
from .live_panel import LivePanel


class Follower(ABC):
    """Shows events and remarks while a job runs."""

    @abstractmethod
    def event(self, event: Event) -> None:
        """Show an event."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Show a remark, such as a warning."""

    def close(self) -> None:
        """The job has ended."""
        return None


class Silent(Follower):
    """Shows remarks only."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def event(self, event: Event) -> None:
        """Show what is worth acting on."""
        if isinstance(event, TrainingWarning):
            self.note(str(formatting.line(event)))

    def note(self, text: str) -> None:
        """A line of its own."""
        self.stream.write(text + "\n")


class Lines(Silent):
    """A line an event, for pipes and log files; of a long training about a hundred steps are shown."""

    shown_steps = 100

    def event(self, event: Event) -> None:
        """Write the event's line, unless it is one of many."""
        if isinstance(event, StepMetrics) and not self._is_shown(event):
            return
        if (text := formatting.line(event)) is not None:
            self.stream.write(text + "\n")
            self.stream.flush()

    def _is_shown(self, event: StepMetrics) -> bool:
        stride = -(-event.total_steps // self.shown_steps)
        return event.step % stride == 0 or event.step in (1, event.total_steps)


class JsonLines(Silent):
    """An object a line on standard output; remarks go to standard error."""

    def __init__(self, output: TextIO, errors: TextIO) -> None:
        super().__init__(errors)
        self.output = output

    def event(self, event: Event) -> None:
        """Write the event with all its fields."""
        self.output.write(json.dumps(event.to_json()) + "\n")
        self.output.flush()


class CountColumn(MofNCompleteColumn):
    """`8/60`, and nothing for what cannot be counted."""

    def render(self, task: Task) -> Text:
        """The count of a task."""
        return super().render(task) if task.total is not None else Text()


class Display(LiveProgress):
    """A moving line with a board below it."""

    def __init__(self, board: LivePanel, console: Console) -> None:
        self.board = board
        super().__init__(
            TextColumn("{task.description}", style="cyan", markup=False),
            BarColumn(bar_width=24),
            CountColumn(table_column=Column(no_wrap=True, min_width=7)),  # the first to be read on a narrow terminal
            TextColumn("{task.fields[figures]}", style="dim", markup=False),
            console=console,
            transient=True,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """What rich draws several times a second."""
        yield self.make_tasks_table(self.tasks)
        yield self.board


class Live(Follower):
    """A moving line and a board on a terminal; what should stay is printed above them."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.board = LivePanel()
        self.display = Display(self.board, console)
        self.display.start()
        self.task: TaskID | None = None
        self.description = ""
        self.begun = (0.0, 0)

    def event(self, event: Event) -> None:
        """Move the line, or print above it."""
        self.board.see(event)
        match event:
            case Phase():
                self._show(event.doing, total=None)
            case DataRead() | TrainingStarted() | RunResumed():
                self._print(formatting.line(event), style="dim")
            case StepMetrics():
                self._show("training", event.total_steps, event.step, formatting.pace(event))
            case Progress():
                self._show(event.doing, event.total, event.done, self._estimate(event))
            case ValidationResult() | BestCheckpoint():
                self._print(formatting.line(event))
            case TrainingWarning():
                self.note(str(formatting.line(event)))

    def _estimate(self, event: Progress) -> str:
        """The time that is left by the pace since the first word of it; of what has no end, how much is done."""
        if event.total is None:
            return f"{event.done} {event.unit}"
        if event.doing != self.description:
            self.begun = (time.monotonic(), event.done)
        since, before = self.begun
        if event.done == before:
            return ""
        pace = (time.monotonic() - since) / (event.done - before)
        return f"{duration(pace * (event.total - event.done))} left"

    def note(self, text: str) -> None:
        """Print above the moving line."""
        self._print(text, style="yellow")

    def close(self) -> None:
        """Take the moving line away, and leave the board."""
        self.display.stop()
        self.console.print(self.board)

    def _print(self, text: str | None, style: str | None = None) -> None:
        # Without markup: a path with brackets is a path.
        self.console.print(text, style=style, markup=False, highlight=False)

    def _show(self, description: str, total: int | None, done: int = 0, figures: str = "") -> None:
        if self.task is None or description != self.description:
            if self.task is not None:
                self.display.remove_task(self.task)  # a total of its own: `update` cannot take one back
            self.task = self.display.add_task(description, total=total, figures=figures)
            self.description = description
        self.display.update(self.task, total=total, completed=done, figures=figures)

"""Events of a job: on the terminal, as lines in a pipe, as JSON for programs, and in the log file of the run."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.formatting import visible

if TYPE_CHECKING:
    from finetune.run.events import Event, EventHandler

    from .progress import ProgressDisplay


@contextmanager
def event_handler(
    quiet: bool, as_json: bool, log: Path | None = None, is_main: bool = True, brief: bool = False
) -> Iterator[EventHandler]:
    """Yield the event handler of a job: it shows events and writes them to a log file.

    Args:
        quiet: Show remarks only.
        as_json: Write events to standard output as JSON.
        log: Log file of all events and remarks, whatever the terminal shows.
        is_main: Whether this process is the main rank. All other ranks show and log nothing.
        brief: Hide the data report and the start of training, which repeat in each trial of a sweep.
    """
    from finetune.run.events import DataRead, TrainingStarted

    with (
        progress_display(quiet, as_json, is_main) as display,
        _logging_to(display, log if is_main else None) as log_event,
    ):

        def on_event(event: Event) -> None:
            if as_json or not (brief and isinstance(event, DataRead | TrainingStarted)):
                display.event(event)
            log_event(event)

        yield on_event


@contextmanager
def progress_display(quiet: bool, as_json: bool, is_main: bool = True) -> Iterator[ProgressDisplay]:
    """Yield the display for this process: live on a terminal, lines in a pipe, JSON for programs."""
    from .progress import JsonLines, Lines, Live, Silent

    display: ProgressDisplay
    if not is_main:
        display = Silent(io.StringIO())
    elif as_json:
        display = JsonLines(sys.stdout, sys.stderr)
    elif quiet:
        display = Silent(sys.stderr)
    elif sys.stderr.isatty():
        from .terminal import Console

        display = Live(Console(stderr=True))
    else:
        display = Lines(sys.stderr)
    try:
        yield display
    finally:
        display.close()


@contextmanager
def _logging_to(display: ProgressDisplay, log: Path | None) -> Iterator[EventHandler]:
    """Send records of the `finetune` logger to the display, and records and events to the log file."""
    _quiet_libraries()
    logger = logging.getLogger("finetune")
    logger.setLevel(logging.INFO)
    logger.propagate = False  # the root logger would print each record a second time
    handlers: list[logging.Handler] = [_NoteHandler(display)]
    if log is not None:
        handlers.append(_LogFile(log, display))
    logger.handlers[:] = handlers
    try:
        yield lambda event: _log_event(handlers[1:], event)
    finally:
        for handler in handlers:
            handler.close()
        logger.handlers.clear()
        logger.propagate = True


class _NoteHandler(logging.Handler):
    """Shows log records as remarks, each distinct text once."""

    def __init__(self, display: ProgressDisplay) -> None:
        super().__init__()
        self.display = display
        self.shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "note" if record.levelno < logging.WARNING else "warning"
        text = f"{prefix}: {record.getMessage()}"
        if text not in self.shown:
            self.shown.add(text)
            self.display.note(text)


class _LogFile(logging.FileHandler):
    """The log file of a run. A full disk is reported once and does not stop the run."""

    def __init__(self, path: Path, display: ProgressDisplay) -> None:
        super().__init__(path, mode="a", encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.display = display
        self.is_full = False

    def _open(self) -> io.TextIOWrapper:
        """Open the file; called by `logging.FileHandler`, which would follow a symbolic link."""
        from finetune.storage.files import disk_faults
        from finetune.storage.opening import open_to_write

        path = Path(self.baseFilename)
        with disk_faults(path):
            return io.TextIOWrapper(open_to_write(path, "ab"), encoding="utf-8")

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record; people show the file on a terminal."""
        return visible(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        """Report the first record that cannot be written; called by `logging` inside its except block."""
        del record
        if not self.is_full:
            self.display.note(f"warning: {self.baseFilename} cannot be written: {sys.exc_info()[1]}")
        self.is_full = True

    def close(self) -> None:
        """Close the file; its last flush fails if the disk is still full."""
        with suppress(OSError):
            super().close()


def _log_event(handlers: list[logging.Handler], event: Event) -> None:
    from .formatting import event_line

    text = event_line(event)
    for handler in handlers if text else ():
        handler.emit(logging.LogRecord("finetune", logging.INFO, "", 0, text, None, None))


def _quiet_libraries() -> None:
    """Turn off progress bars and remarks of other libraries: they would break the live display."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("bitsandbytes", "accelerate", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:  # a user who passes -W wants the warnings
        warnings.simplefilter("ignore")

"""Standard output and standard error: this module, the prompts and the views are the only ones that print.

Results go to standard output; progress, notes and errors go to standard error. With `--json`, standard output
contains one JSON object per line and nothing else.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NoReturn, TextIO

from finetune.errors import FinetuneError, Interrupted, RecipeError, Stopped
from finetune.formatting import json_line, visible

_json_mode = False


def use_json(enabled: bool) -> bool:
    """Set whether errors are also printed as JSON events.

    This is the callback of `--json`: it runs while arguments are parsed, so it covers the first error of a command.
    """
    global _json_mode
    _json_mode = enabled
    return enabled


def show_result(text: str) -> None:
    """Print the result of a command on standard output."""
    _print(visible(text))


def show_json(value: Any) -> None:
    """Print a value as one line of JSON on standard output."""
    _print(json_line(value))


def show_text(text: str) -> None:
    """Print text of a model on standard output: as it is into a file or a pipe, visible on a terminal."""
    _print(visible(text) if stdout_is_terminal() else text)


def show_title(text: str) -> None:
    """Print a title above text of a model."""
    _print(styled(visible(text) if stdout_is_terminal() else text, "1", sys.stdout))


def show_note(text: str, style: str | None = None) -> None:
    """Print a remark on standard error, in an ANSI style where that is a terminal."""
    sys.stderr.write(styled(visible(text), style) + "\n")


def _print(text: str) -> None:
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


def show_error(error: FinetuneError) -> None:
    """Print an error with its location and hint; with `--json` also as an event on standard output."""
    is_stop = isinstance(error, Stopped | Interrupted)
    if _json_mode:
        event = "stopped" if is_stop else "error"
        show_json({"event": event, "code": error.exit_code, **_error_fields(error)})
    title = styled("stopped", "1;33") if is_stop else styled("error", "1;31")
    for line in error.lines():
        if line.startswith("  ->"):
            show_note(line, "33")
        else:
            sys.stderr.write(f"{title}: {visible(line)}\n")


def _error_fields(error: FinetuneError) -> dict[str, Any]:
    if isinstance(error, RecipeError):
        return {"what": error.what, "problems": [vars(problem) for problem in error.problems]}
    return {"what": error.what, "where": error.where, "hint": error.hint}


def exit_immediately() -> NoReturn:
    """End the process without cleanup, after restoring the cursor that a progress bar hides."""
    if sys.stderr.isatty():
        # os.write: this runs in a signal handler, where the buffered stream may be locked.
        os.write(sys.stderr.fileno(), b"\033[?25h\n")
    os._exit(Interrupted.exit_code)


def stdout_is_terminal() -> bool:
    """Whether results are printed to a terminal."""
    return sys.stdout.isatty()


def styled(text: str, code: str | None, stream: TextIO | None = None) -> str:
    """ANSI colours if the stream (standard error by default) is a terminal and NO_COLOR is not set."""
    plain = code is None or not (stream or sys.stderr).isatty() or "NO_COLOR" in os.environ
    return text if plain else f"\033[{code}m{text}\033[0m"


def short_path(path: Path) -> Path:
    """The path relative to the working directory if it is below it."""
    here = Path.cwd()
    return path.relative_to(here) if here in path.parents else path

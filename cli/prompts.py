"""Questions to the user, and generated answers in the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.formatting import counted

from .output import show_note, show_result, stdout_is_terminal, styled
from .sanitize import sanitize


def stdin_is_terminal() -> bool:
    """Whether a person types the input."""
    return sys.stdin.isatty()


def read_line(prompt: str) -> str | None:
    """A line from a person or a pipe; None at the end of the input. Ctrl-C discards the line."""
    try:
        if stdin_is_terminal() and stdout_is_terminal():
            import readline  # noqa: F401, importing it gives `input` line editing and history

            return input(prompt)
        if stdin_is_terminal():
            sys.stderr.write(prompt)
            sys.stderr.flush()
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None
    except EOFError:
        show_note("")
        return None
    except KeyboardInterrupt:
        show_note("")
        return ""


def ask(question: str, default: str | None = None) -> str | None:
    """Ask the user; an empty answer, or no terminal, gives the default."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return default
    sys.stderr.write(f"{question}{f' [{default}]' if default else ''}: ")
    sys.stderr.flush()
    return sys.stdin.readline().strip() or default


def confirm(question: str) -> bool:
    """Ask the user for yes or no; without a terminal the answer is no."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@contextmanager
def streamed_answer() -> Iterator[Callable[[str], None]]:
    """Print an answer while the model generates it: yields a function for each piece, and ends the line."""

    def write(piece: str) -> None:
        sys.stdout.write(_sanitized_for_terminal(piece))
        sys.stdout.flush()

    try:
        yield write
    finally:
        write("\n")


def show_answers(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print generated answers. A single answer stands alone; several have their prompt and adapter above them."""
    if as_json:
        for row in rows:
            show_result(json.dumps(row, ensure_ascii=False))
        return
    if len(rows) == 1:
        show_result(_sanitized_for_terminal(rows[0]["generated"]))
        return
    has_prompts, has_names = (len({row[key] for row in rows}) > 1 for key in ("prompt", "adapter"))
    blocks = []
    for index, row in enumerate(rows):
        lines = []
        if has_prompts and (index == 0 or rows[index - 1]["prompt"] != row["prompt"]):
            lines.append(_title(f"> {row['prompt']}"))
        if has_names:
            lines.append(_title(f"{row['adapter']}:"))
        blocks.append("\n".join([*lines, _sanitized_for_terminal(row["generated"])]))
    show_result("\n\n".join(blocks))


def show_answers_file(file: Path, answers: int, as_json: bool) -> None:
    """Print the file that the answers were written to."""
    if as_json:
        show_result(json.dumps({"event": "generated", "file": str(file), "answers": answers}))
        return
    show_result(f"{counted(answers, 'answer')}: {file}")


def _title(text: str) -> str:
    return styled(_sanitized_for_terminal(text), "1", sys.stdout)


def _sanitized_for_terminal(text: str) -> str:
    """Text without control characters on a terminal; a pipe gets it unchanged."""
    return sanitize(text) if stdout_is_terminal() else text

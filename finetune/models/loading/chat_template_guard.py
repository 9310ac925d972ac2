"""Limits of time, memory and output length for chat templates, which are programs from the model's publisher.

transformers renders templates in a sandbox without access to Python, but with unlimited time and memory. So there are
two guards. When the tokenizer loads, two short messages are rendered in a child process that can be killed
(`check_template_terminates`). Each later rendering runs in this process, with limits of CPU time and memory (`render`).
There, a single operation in C cannot be interrupted, and only the memory limit bounds it.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import date, datetime
from datetime import time as clock
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from finetune.errors import ModelError
from finetune.storage.opening import open_to_read

PROBE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
SECONDS = 10
BYTES = 1 << 30
LENGTH = 1 << 20
"""Characters that a template may render for two short messages."""

LENGTH_PER_CHARACTER = 50
"""Characters that a template may render for each character of a row, beyond `BASE_LENGTH`."""

BASE_LENGTH = 1 << 16
"""Characters that it may render for any row, such as a default system message."""

FINE, TOO_LONG, TOO_LARGE = 0, 3, 4
"""Exit codes of the child process."""


def check_template_terminates(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Render two short messages in a child process with limits of 10 s and 1 GiB.

    A template that raises an error for these messages passes: it may accept others, and the error for a row is reported
    when the row is rendered.

    Raises:
        ModelError: The template does not terminate, needs too much memory, or renders too much text.
    """
    if not tokenizer.chat_template:
        return
    # A fork, not a thread: a hostile template may loop within one C call, where a thread cannot be stopped. Python 3.12
    # and later warn about `fork` in a process with threads; this child only renders and exits.
    child = os.fork()
    if not child:
        _render_and_exit(tokenizer)
    outcome = _wait(child)
    if outcome == FINE:
        return
    reasons = {
        TOO_LONG: f"renders more than {LENGTH} characters for",
        TOO_LARGE: f"needs more than {BYTES >> 20} MB for",
    }
    raise ModelError(
        f"the chat template {reasons.get(outcome, f'is not done after {SECONDS} s with')} two short messages",
        where=where,
        hint="use another tokenizer: this one's template is broken or hostile",
    )


class TemplateLimit(Exception):
    """A template exceeded a limit of time, memory or output length; the message names which."""


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **arguments: Any) -> str:
    """`apply_chat_template` as text, within limits of CPU time, memory and output length.

    The date that the template writes is `tokenizer.today`, by default the day of the first call, at 0:00: a run renders
    the same text on every day.

    Raises:
        TemplateLimit: A limit was exceeded.
    """
    _fix_date(tokenizer, arguments.get("tools"))
    try:
        with _limits():
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    except (MemoryError, OverflowError):
        raise TemplateLimit(f"needs more than {BYTES >> 20} MB") from None
    # The first condition spares nearly every row the JSON.
    if len(text) > BASE_LENGTH and len(text) > _longest(messages, arguments):
        raise TemplateLimit(f"renders {len(text)} characters")
    return text


def _fix_date(tokenizer: PreTrainedTokenizerBase, tools: Any) -> None:
    """Fix the date of `strftime_now` in the tokenizer's compiled template.

    transformers defines the function in the template's environment, and replaces functions in the variables of a call
    by their names. A template has its own globals before those of the environment, and is compiled once.
    """
    template = tokenizer.chat_template
    sources = template.values() if isinstance(template, Mapping) else [template or ""]
    if any("strftime_now" in source for source in sources):
        compiled = _compile_jinja_template(tokenizer.get_chat_template(None, tools))
        today = getattr(tokenizer, "today", None) or _first_day()
        compiled.globals["strftime_now"] = datetime.combine(today, clock()).strftime


_first_day = cache(date.today)


def _longest(messages: list[dict[str, Any]], arguments: dict[str, Any]) -> int:
    """Characters that a template may render for a row."""
    return BASE_LENGTH + LENGTH_PER_CHARACTER * len(json.dumps([messages, arguments]))


class _Limits:
    """A context that raises TemplateLimit after `SECONDS` of CPU time, and MemoryError after `BYTES` of new memory.

    It is entered for every row, so its cost matters (microseconds): the signal handler is installed once, and the
    memory use of the process is read once a second.
    """

    def __init__(self) -> None:
        # The main thread only: `signal.signal` raises ValueError in any other, and handlers run in the main thread.
        # SIGPROF counts CPU time of the process, so that a suspended or waiting process does not time out.
        signal.signal(signal.SIGPROF, _time_is_up)
        self._read_at = -math.inf

    def __enter__(self) -> None:
        now = time.monotonic()
        if now > self._read_at + 1:
            self._read_at = now
            self._before = resource.getrlimit(resource.RLIMIT_DATA)
            self._within = _within(*self._before)
        # Repeated every second: an exception that the handler raises within a destructor is swallowed by Python.
        signal.setitimer(signal.ITIMER_PROF, SECONDS, 1)
        resource.setrlimit(resource.RLIMIT_DATA, self._within)

    def __exit__(self, *raised: object) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, self._before)
        signal.setitimer(signal.ITIMER_PROF, 0)


_limits = cache(_Limits)


def _time_is_up(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise TemplateLimit(f"is not done after {SECONDS} s")


def _within(soft: int, hard: int) -> tuple[int, int]:
    """Soft and hard RLIMIT_DATA that allow `BYTES` beyond the current use, unless the limits are lower already."""
    try:
        with open_to_read(Path("/proc/self/statm")) as file:
            used = int(file.read().split()[5]) * resource.getpagesize()  # data and stack, as RLIMIT_DATA counts
    except OSError:  # no /proc: only the time is limited
        return soft, hard
    return (used + BYTES if soft == resource.RLIM_INFINITY else min(soft, used + BYTES)), hard


def _render_and_exit(tokenizer: PreTrainedTokenizerBase) -> None:
    """The child process: renders, and ends with an exit code; never returns."""
    outcome = FINE
    resource.setrlimit(resource.RLIMIT_DATA, _within(*resource.getrlimit(resource.RLIMIT_DATA)))
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        if len(tokenizer.apply_chat_template(PROBE, tokenize=False)) > LENGTH:
            outcome = TOO_LONG
    except (MemoryError, OverflowError):
        outcome = TOO_LARGE
    except Exception:  # a template that rejects these messages may accept others
        outcome = FINE
    finally:
        os._exit(outcome)  # without the parent's exit handlers and buffered output


def _wait(child: int) -> int:
    """The child's exit code. It is killed after a deadline: RLIMIT_CPU does not count time that it sleeps."""
    deadline = time.monotonic() + 3 * SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL

"""A chat template is a program: it must end soon, take little memory and write little, whatever the row.

transformers renders templates in a sandbox without access to Python; what it does not limit is time and memory. Two
short messages are rendered first in a process that can be killed. What a template does to certain rows only is limited
where it is rendered: there, what a single operation of Python's takes is bounded by its memory alone.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import time
from contextlib import suppress
from functools import cache
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune.errors import ModelError

PROBE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
SECONDS = 10
BYTES = 1 << 30
LENGTH = 1 << 20
"""Characters that a template may make of two short messages."""

LENGTH_PER_CHARACTER = 50
"""Characters that a template may make of each character of a row, beyond `ROOM`."""

ROOM = 1 << 16
"""Characters that it may make of any row, such as a system message of its own."""

FINE, TOO_LONG, TOO_LARGE = 0, 3, 4


def check_template_terminates(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Render two short messages in a child that has 10 s, 1 GiB and no more to say than a number.

    What the template makes of roles or tools is told later, with the row that it refuses.

    Raises:
        ModelError: The template does not end, or takes the memory, or makes a flood of text.
    """
    if not tokenizer.chat_template:
        return
    child = os.fork()
    if not child:
        _render_and_exit(tokenizer)
    outcome = _wait(child)
    if outcome == FINE:
        return
    reasons = {TOO_LONG: f"makes more than {LENGTH} characters of", TOO_LARGE: f"needs more than {BYTES >> 20} MB for"}
    raise ModelError(
        f"the chat template {reasons.get(outcome, f'is not done after {SECONDS} s with')} two short messages",
        where=where,
        hint="use another tokenizer: this one's template is broken or hostile",
    )


class TemplateLimit(Exception):
    """A template took more time, memory or text than any row is worth; says which."""


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **arguments: Any) -> str:
    """`apply_chat_template` as text, within limits of processor time, memory and length.

    Raises:
        TemplateLimit: One of them was reached.
    """
    try:
        with _limits():
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    except (MemoryError, OverflowError):
        raise TemplateLimit(f"needs more than {BYTES >> 20} MB") from None
    if len(text) > ROOM and len(text) > ROOM + LENGTH_PER_CHARACTER * len(json.dumps([messages, arguments])):
        raise TemplateLimit(f"makes {len(text)} characters")
    return text


class _Limits:
    """A block that ends with TemplateLimit after `SECONDS` of the process's time, and with MemoryError after `BYTES`.

    It is entered for every rendering, so that what takes microseconds is done once: the signal handler is the
    process's, and how much the process holds is read once a second.
    """

    def __init__(self) -> None:
        signal.signal(signal.SIGPROF, _time_is_up)
        self._read_at = -math.inf

    def __enter__(self) -> None:
        now = time.monotonic()
        if now > self._read_at + 1:
            self._read_at = now
            self._before = resource.getrlimit(resource.RLIMIT_DATA)
            self._within = _within(*self._before)
        # Again every second, in case that the first signal is lost in a destructor.
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
    """Soft and hard RLIMIT_DATA that leave the process `BYTES` more than it holds, if they are not lower already."""
    try:
        with open("/proc/self/statm", "rb") as file:
            held = int(file.read().split()[5]) * resource.getpagesize()  # data and stack, which the limit is on
    except OSError:  # no /proc: the time is limited all the same
        return soft, hard
    return (held + BYTES if soft == resource.RLIM_INFINITY else min(soft, held + BYTES)), hard


def _render_and_exit(tokenizer: PreTrainedTokenizerBase) -> None:
    """In the child: never returns, whatever happens."""
    outcome = FINE
    resource.setrlimit(resource.RLIMIT_DATA, _within(*resource.getrlimit(resource.RLIMIT_DATA)))
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        if len(tokenizer.apply_chat_template(PROBE, tokenize=False)) > LENGTH:
            outcome = TOO_LONG
    except (MemoryError, OverflowError):
        outcome = TOO_LARGE
    except Exception:  # a template that refuses these messages may take others
        outcome = FINE
    finally:
        os._exit(outcome)


def _wait(child: int) -> int:
    """The child's exit code; it is killed when its time is up, for it may sleep as well as compute."""
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

"""A chat template is a program: before it is used it must end soon, and write little, in a process that can be stopped.

transformers renders templates in a sandbox without access to Python; what it does not limit is time and memory.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from contextlib import suppress

from transformers import PreTrainedTokenizerBase

from finetune.errors import ModelError

PROBE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
SECONDS = 10
BYTES = 1 << 30
LENGTH = 1 << 20
"""Characters that a template may make of two short messages."""

FINE, TOO_LONG, TOO_LARGE = 0, 3, 4


def refuse_endless_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
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


def _render_and_exit(tokenizer: PreTrainedTokenizerBase) -> None:
    """In the child: never returns, whatever happens."""
    outcome = FINE
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            held = int(file.read().split()[5]) * resource.getpagesize()  # data and stack, which the limit is on
        resource.setrlimit(resource.RLIMIT_DATA, (held + BYTES, held + BYTES))
    except OSError:  # no /proc: the time is limited all the same
        pass
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

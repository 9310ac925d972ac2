"""A signal raises at once, or sets a flag where it is deferred; a second Ctrl-C ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.run.signals import (
    SIGNALS,
    Interruption,
    StopRequested,
    ended_by_signals,
    interrupted_exit_code,
)

ROOT = Path(__file__).parents[3]


def never() -> None:
    raise AssertionError("no second SIGINT was sent")


def signal_own_process(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(5)  # not reached


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_raises_at_once_unless_deferred(number: int):
    interruption = Interruption()
    with interruption.listening(never), pytest.raises(StopRequested) as caught:
        signal_own_process(number)
    assert caught.value.number == interruption.number == number


@pytest.mark.parametrize("number", SIGNALS)
def test_deferred_signal_sets_flag_until_poll(number: int):
    interruption = Interruption()
    with interruption.listening(never), interruption.deferred():
        interruption.poll()
        os.kill(os.getpid(), number)
        assert interruption.is_asked
        with pytest.raises(StopRequested) as caught:
            interruption.poll()
    assert caught.value.number == number


@pytest.fixture(autouse=True)
def _hangup_is_not_ignored() -> Iterator[None]:
    """As in a terminal; a test run under nohup would inherit an ignored SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_in_the_training_loop_is_deferred_in_a_command(number: int):
    """The handler of the command must not raise in the middle of a step."""
    interruption = Interruption()
    with ended_by_signals(), interruption.listening(never), interruption.deferred():
        os.kill(os.getpid(), number)
        assert interruption.number == number


def test_listening_leaves_an_ignored_hangup_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interruption = Interruption()
    with interruption.listening(never):
        os.kill(os.getpid(), signal.SIGHUP)
    assert interruption.number is None


def test_first_signal_is_recorded():
    interruption = Interruption()
    with interruption.listening(never), interruption.deferred():
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert interruption.number == signal.SIGTERM


def test_listening_restores_handlers():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interruption().listening(never):
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_that_ends_a_command_runs_its_clean_up_and_no_second_one_interrupts_that(number: int):
    cleaned_up = []

    def command() -> None:
        try:
            signal_own_process(number)
        finally:
            os.kill(os.getpid(), number)
            cleaned_up.append(True)

    with pytest.raises(StopRequested) as caught, ended_by_signals():
        command()
    assert signal.getsignal(number) is signal.SIG_DFL
    assert cleaned_up
    assert interrupted_exit_code(caught.value) == 128 + number


def test_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with ended_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_exit_code_of_an_interrupt_by_the_keyboard_is_130():
    assert interrupted_exit_code(KeyboardInterrupt()) == 130


BUSY = """
import hashlib, os
from finetune.run.signals import Interruption

interruption = Interruption()
with interruption.listening(lambda: os._exit(130)), interruption.deferred():
    print("ready", flush=True)
    # Hours in C without the GIL, as in a kernel of PyTorch: Python's own handlers cannot run.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def test_second_interrupt_ends_process_during_long_operation():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.wait()

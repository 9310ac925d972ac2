"""Signals set a flag; only a second Ctrl-C acts by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.run.signals import SIGNALS, Interruption, StopRequested

ROOT = Path(__file__).parents[3]


def never() -> None:
    raise AssertionError("no second SIGINT was sent")


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_sets_flag_until_poll(number: int):
    interruption = Interruption()
    with interruption.listening(never):
        interruption.poll()
        os.kill(os.getpid(), number)
        assert interruption.is_asked
        with pytest.raises(StopRequested) as caught:
            interruption.poll()
    assert caught.value.number == number


def test_first_signal_is_recorded():
    interruption = Interruption()
    with interruption.listening(never):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert interruption.number == signal.SIGTERM


def test_listening_restores_handlers():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interruption().listening(never):
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


BUSY = """
import hashlib, os
from finetune.run.signals import Interruption

with Interruption().listening(lambda: os._exit(130)):
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

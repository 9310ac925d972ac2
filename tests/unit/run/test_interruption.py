"""A signal is noted, and acted on where the run looks; only a second Ctrl-C acts by itself."""

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
    raise AssertionError("nobody asked to leave at once")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_nothing_else_happens_until_one_looks(number: int):
    interruption = Interruption()
    with interruption.listening(never):
        interruption.poll()
        os.kill(os.getpid(), number)
        assert interruption.is_asked
        with pytest.raises(StopRequested) as caught:
            interruption.poll()
    assert caught.value.number == number


def test_the_first_signal_is_the_one_that_is_told():
    interruption = Interruption()
    with interruption.listening(never):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert interruption.number == signal.SIGTERM


def test_handlers_are_what_they_were_afterwards():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interruption().listening(never):
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


BUSY = """
import os, sys, time
import torch
from finetune.run.signals import Interruption

rows = torch.randn(3000, 3000)
with Interruption().listening(lambda: os._exit(130)):
    print("ready", flush=True)
    for _ in range(1000):
        for _ in range(20):
            rows @ rows  # long operations in C, in which Python's handlers do not run
"""


def test_a_second_interrupt_ends_the_process_within_a_second_whatever_it_computes():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=1) == 130
    finally:
        process.kill()
        process.wait()

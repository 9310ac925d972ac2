"""Signals as requests: a handler notes that one came, and the run looks where it can stop in good order."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What people and schedulers send to end a run, or to say that its time is nearly up."""


class StopRequested(Exception):
    """The run was asked to stop; nothing is wrong with it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"by {signal.Signals(number).name}")
        self.number = number


class Interruption:
    """Whether a run was asked to stop.

    Attributes:
        number: The first signal that came, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @property
    def is_asked(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    def poll(self) -> None:
        """Raise StopRequested if a signal came."""
        if self.number is not None:
            raise StopRequested(self.number)

    def stop(self) -> None:
        """Raise StopRequested because a process of the run got a signal, be it this one or another."""
        raise StopRequested(self.number or signal.SIGTERM)

    @contextmanager
    def listening(self, leave: Callable[[], None]) -> Iterator[None]:
        """Take note of signals while the block runs; call this from the main thread.

        Args:
            leave: Called when a second SIGINT comes, from a thread that waits for it: Python's own handlers would
                wait for the end of a long operation in PyTorch or of a write.
        """
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        Thread(target=_leave_on_second_interrupt, args=(reading, leave), daemon=True).start()
        wakeup_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        handlers_before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in handlers_before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup_before)
            os.close(writing)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.number is None:
            self.number = number


def _leave_on_second_interrupt(reading: int, leave: Callable[[], None]) -> None:
    """Count the signals that the interpreter writes into a pipe, a byte each, until its other end is closed."""
    interrupts = 0
    while numbers := os.read(reading, 64):
        interrupts += numbers.count(signal.SIGINT)
        if interrupts > 1:
            leave()
    os.close(reading)

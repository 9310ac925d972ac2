"""Signal handling: a handler sets a flag, and the training loop stops at its next safe point."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals by which users and schedulers end a run, or announce the end of its time limit."""


class StopRequested(Exception):
    """A signal requested that the run stops; not an error of the run."""

    def __init__(self, number: int) -> None:
        super().__init__(f"by {signal.Signals(number).name}")
        self.number = number


class Interruption:
    """Flag of a requested stop.

    Attributes:
        number: The first signal received, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @property
    def is_asked(self) -> bool:
        """Whether a signal was received."""
        return self.number is not None

    def poll(self) -> None:
        """Raise StopRequested if a signal was received."""
        if self.number is not None:
            raise StopRequested(self.number)

    def stop(self) -> None:
        """Raise StopRequested because some rank received a signal; SIGTERM is assumed if it was not this one."""
        raise StopRequested(self.number or signal.SIGTERM)

    @contextmanager
    def listening(self, leave: Callable[[], None]) -> Iterator[None]:
        """Handle signals during the block; call this from the main thread.

        Args:
            leave: Called from a watcher thread on the second SIGINT. Python runs its own handlers only between
                bytecodes, so they would wait for a long operation in PyTorch or a blocking write.
        """
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        Thread(target=_leave_on_second_interrupt, args=(reading, leave), daemon=True).start()
        # The C-level handler writes each signal's number into the pipe at once, whatever the main thread executes.
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
    """Count SIGINT among the bytes of the wakeup pipe, one for each signal, until its other end is closed."""
    interrupts = 0
    while numbers := os.read(reading, 64):
        interrupts += numbers.count(signal.SIGINT)
        if interrupts > 1:
            leave()
    os.close(reading)

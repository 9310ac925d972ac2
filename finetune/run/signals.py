"""Signal handling: a signal ends a command as Ctrl-C does, with its clean-up; the training loop stops after a step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals by which users, terminals and schedulers end a run, or announce the end of its time limit."""


class StopRequested(KeyboardInterrupt):
    """A signal requested that the command ends; not an error of it.

    Like Ctrl-C it is no Exception, which libraries catch.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"by {signal.Signals(number).name}")
        self.number = number


def interrupted_exit_code(interrupt: KeyboardInterrupt) -> int:
    """Exit code of a command that a signal ended: 128 + the signal's number, as shells do."""
    return 128 + (interrupt.number if isinstance(interrupt, StopRequested) else signal.SIGINT)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise StopRequested for the signals that would end the process without clean-up, SIGTERM and SIGHUP.

    A signal that is ignored, as SIGHUP is under `nohup`, stays ignored. Call this from the main thread.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        for each in handled:
            signal.signal(each, signal.SIG_IGN)  # a second one must not end the clean-up
        raise StopRequested(number)

    handled = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in handled:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


class Interruption:
    """A requested stop: an exception in the main thread, or a flag where a block defers it to its safe points.

    Attributes:
        number: The first signal received, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._is_deferred = False

    @property
    def is_asked(self) -> bool:
        """Whether a signal was received."""
        return self.number is not None

    def poll(self) -> None:
        """Raise StopRequested if a signal was received."""
        if self.number is not None:
            raise StopRequested(self.number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a signal only sets the flag, which the block polls."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def stop(self) -> None:
        """Raise StopRequested because some rank received a signal; SIGTERM is assumed if it was not this one."""
        raise StopRequested(self.number or signal.SIGTERM)

    @contextmanager
    def listening(self, leave: Callable[[], None]) -> Iterator[None]:
        """Handle signals during the block: the first one raises StopRequested, unless `deferred`.

        Call this from the main thread.

        Args:
            leave: Called from a watcher thread on the second SIGINT. Python runs its own handlers only between
                bytecodes, so they would wait for a long operation in PyTorch or a blocking write.
        """
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        Thread(target=_leave_on_second_interrupt, args=(reading, leave), daemon=True).start()
        # The C-level handler writes each signal's number into the pipe at once, whatever the main thread executes.
        wakeup_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        # SIGHUP is ignored under `nohup`, and stays so.
        handled = [each for each in SIGNALS if each != signal.SIGHUP or signal.getsignal(each) is not signal.SIG_IGN]
        handlers_before = {number: signal.signal(number, self._note) for number in handled}
        try:
            yield
        finally:
            for number, handler in handlers_before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup_before)
            os.close(writing)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.number is not None:
            return
        self.number = number
        if not self._is_deferred:
            raise StopRequested(number)


def _leave_on_second_interrupt(reading: int, leave: Callable[[], None]) -> None:
    """Count SIGINT among the bytes of the wakeup pipe, one for each signal, until its other end is closed."""
    interrupts = 0
    while numbers := os.read(reading, 64):
        interrupts += numbers.count(signal.SIGINT)
        if interrupts > 1:
            leave()
    os.close(reading)

"""Errors that a user can fix, each with an exit code for schedulers.

Any other exception is a bug in ft: it keeps its traceback and exits with 1.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class FinetuneError(Exception):
    """An error in the user's terms: the problem, its place and the fix.

    Args:
        what: One sentence: the problem and, if it helps, the value found.
        where: The place: `file:line:column`, a path, or a run and step.
        hint: The fix, as an instruction.
    """

    exit_code: int = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def lines(self) -> list[str]:
        """The message: a line for the problem, one for the fix; several fixes have a line each."""
        first = f"{self.where}: {self.what}" if self.where else self.what
        return [first, *(f"  -> {fix}" for fix in (self.hint or "").splitlines())]

    def __str__(self) -> str:
        return "\n".join(self.lines())


@dataclass(frozen=True)
class Problem:
    """A problem in a recipe.

    Attributes:
        where: `file:line:column`, or the `--set` argument of the value.
        key: Dotted path of the key, such as `adapter.r` or `data.train.0.path`.
        what: The expected and the found value.
        hint: The fix, if one is known.
    """

    where: str
    key: str
    what: str
    hint: str | None = None


class UsageError(FinetuneError):
    """The command line is not valid."""

    exit_code = 2


class RecipeError(FinetuneError):
    """A recipe that is not valid, with all its problems."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        super().__init__(f"{count} problem{'s' if count != 1 else ''} in the recipe")

    def lines(self) -> list[str]:
        """A line for each problem, and its fix below it."""
        lines = []
        for problem in self.problems:
            key = f"{problem.key}: " if problem.key and not problem.where.endswith(problem.key) else ""
            lines.append(f"{problem.where}: {key}{problem.what}")
            if problem.hint:
                lines.append(f"  -> {problem.hint}")
        return lines


class ModelError(FinetuneError):
    """A model or tokenizer that is missing, incomplete or not suitable for the recipe."""

    exit_code = 2


class UnsupportedError(FinetuneError):
    """A combination that is not supported, with the reason."""

    exit_code = 2


class DataError(FinetuneError):
    """A data file or row that cannot be used."""

    exit_code = 3


class BadRow(DataError):
    """A row that cannot be used although its file is sound; `data.on_bad_row` says what happens to it.

    Args:
        what: One sentence: the problem.
        reason: The kind of problem, under which such rows are counted.
        where: Place of the row.
        hint: The fix.
    """

    def __init__(self, what: str, *, reason: str, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what, where=where, hint=hint)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """For `pickle`: worker processes send their errors to the parent."""
        return _bad_row, (self.what, self.reason, self.where, self.hint)


def _bad_row(what: str, reason: str, where: str | None, hint: str | None) -> BadRow:
    return BadRow(what, reason=reason, where=where, hint=hint)


class OutOfMemoryError(FinetuneError):
    """The device or the machine ran out of memory."""

    exit_code = 4


# As PyTorch's allocators, CUDA's libraries, the C library (ENOMEM, for a file that cannot be mapped) and C++ say it.
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "status_alloc_failed",
    "cannot allocate memory",
    "bad_alloc",
)


def as_out_of_memory(error: BaseException) -> OutOfMemoryError | None:
    """Convert an out-of-memory error of PyTorch, Python or the system, on a GPU or a CPU; None for other errors."""
    text = str(error).lower()
    is_out_of_memory = (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in text for words in _OUT_OF_MEMORY)
    )
    if not is_out_of_memory:
        return None
    return OutOfMemoryError(
        "out of memory",
        hint="lower training.micro_batch_size and raise gradient_accumulation_steps by the same factor, "
        "or set training.gradient_checkpointing: true",
    )


class DivergedError(FinetuneError):
    """A loss or gradient is NaN or infinite; the weights are those of the last good step."""

    exit_code = 5


class CheckFailedError(FinetuneError):
    """A requested check failed, such as a reproduction or a gate."""

    exit_code = 5


class RefusedError(FinetuneError):
    """Refused for safety: another base, a directory that ft did not create, a lock."""

    exit_code = 6


class EnvironmentFault(FinetuneError):
    """A fault of the machine: disk, permissions, network, a missing device."""

    exit_code = 7


_DISK_FAULTS = frozenset(
    (
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE),
        *(errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO),
    )
)


def as_disk_fault(error: BaseException) -> EnvironmentFault | None:
    """Convert an error of the operating system on a file that no caller has converted; None for other errors.

    A missing file is a bug: whoever opens a file of the user checks that it is there.
    """
    if not isinstance(error, OSError) or error.filename is None:
        return None
    if error.errno not in _DISK_FAULTS:
        return None
    return EnvironmentFault(
        f"cannot be read or written: {error.strerror}",
        where=str(error.filename),
        hint="check permissions and free space",
    )


class ProcessLost(EnvironmentFault):
    """Another process of the run has ended or is unreachable."""


def as_lost_process(error: BaseException) -> ProcessLost | None:
    """Convert an error of gloo or NCCL on a lost process; None for other errors."""
    is_loss = type(error).__name__ in ("DistBackendError", "DistNetworkError") or "gloo/transport" in str(error)
    if not is_loss:
        return None
    return ProcessLost("another process of the run has ended", hint="see what ended it")


def as_process_limit(error: BaseException) -> EnvironmentFault | None:
    """Convert the refusal of the system to start a thread or a process; None for other errors."""
    is_refusal = "can't start new thread" in str(error) or (isinstance(error, OSError) and error.errno == errno.EAGAIN)
    if not is_refusal:
        return None
    return EnvironmentFault(
        "the system starts no further thread or process",
        hint="raise the limit of processes (ulimit -u) or of memory (ulimit -v), or end other programs",
    )


def as_machine_fault(error: BaseException) -> FinetuneError | None:
    """Convert an error that the machine causes and no caller has converted; None for other errors, which are bugs."""
    return as_out_of_memory(error) or as_lost_process(error) or as_disk_fault(error) or as_process_limit(error)


class ProcessFailed(FinetuneError):
    """The error of one of several processes, which ended the run; it has that error's exit code."""

    def __init__(
        self, what: str, *, code: int = 1, traceback: str = "", where: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.exit_code = code
        self.traceback = traceback

    def lines(self) -> list[str]:
        """The message, followed by the traceback of a bug."""
        return [*super().lines(), *self.traceback.splitlines()]


class Stopped(FinetuneError):
    """A signal stopped the run after a checkpoint; the run can be resumed."""

    exit_code = 75  # EX_TEMPFAIL: the one code after which a scheduler should try again


class Interrupted(FinetuneError):
    """A signal ended the run before its first checkpoint."""

    exit_code = 128 + signal.SIGINT

    def __init__(
        self, what: str, *, number: int = signal.SIGINT, where: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.exit_code = 128 + number

"""The errors that a user can cause, each with the exit code that a scheduler acts on.

Anything else that escapes is a bug of ours: it keeps its traceback and exits with 1.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass


class FinetuneError(Exception):
    """What went wrong in the user's terms, where, and the one thing to do about it.

    Args:
        what: One sentence: what happened and, where it helps, what was found.
        where: The place: `file:line:column`, a path, or a run and step.
        hint: The remedy, as an instruction.
    """

    exit_code: int = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def lines(self) -> list[str]:
        """The message, a line each for what happened and for the remedy."""
        first = f"{self.where}: {self.what}" if self.where else self.what
        return [first, *([f"  -> {self.hint}"] if self.hint else [])]

    def __str__(self) -> str:
        return "\n".join(self.lines())


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a recipe.

    Attributes:
        where: `file:line:column`, or the `--set` argument that brought the value.
        key: Dotted path of the key, such as `adapter.r` or `data.train.0.path`.
        what: What was expected and what was found.
        hint: The remedy, where one is known.
    """

    where: str
    key: str
    what: str
    hint: str | None = None


class UsageError(FinetuneError):
    """The command line asks for something that cannot be done."""

    exit_code = 2


class RecipeError(FinetuneError):
    """A recipe that cannot be run; carries every problem of the file at once."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        super().__init__(f"{count} problem{'s' if count != 1 else ''} in the recipe")

    def lines(self) -> list[str]:
        """A line for each problem, and its remedy below it."""
        lines = []
        for problem in self.problems:
            key = f"{problem.key}: " if problem.key and not problem.where.endswith(problem.key) else ""
            lines.append(f"{problem.where}: {key}{problem.what}")
            if problem.hint:
                lines.append(f"  -> {problem.hint}")
        return lines


class ModelError(FinetuneError):
    """A model or tokenizer that is missing, incomplete or unfit for the recipe."""

    exit_code = 2


class UnsupportedError(FinetuneError):
    """A combination that cannot be done, with the reason."""

    exit_code = 2


class DataError(FinetuneError):
    """A data file or row that cannot be used."""

    exit_code = 3


class OutOfMemoryError(FinetuneError):
    """The device or the machine ran out of memory."""

    exit_code = 4


def as_out_of_memory(error: BaseException) -> OutOfMemoryError | None:
    """The user's error for PyTorch's or Python's word that memory is used up, on a GPU or a CPU; else None."""
    is_shortage = (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error) for words in ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED"))
    )
    if not is_shortage:
        return None
    return OutOfMemoryError(
        "out of memory",
        hint="lower training.micro_batch_size and raise gradient_accumulation_steps by the same factor, "
        "or set training.gradient_checkpointing: true",
    )


class DivergedError(FinetuneError):
    """A loss or gradient that is not finite; the weights are those of the last good step."""

    exit_code = 5


class CheckFailedError(FinetuneError):
    """A check that was asked for, such as that of a reproduction, came out negative."""

    exit_code = 5


class RefusedError(FinetuneError):
    """Refused for safety: another base, a directory that is not ours, a lock."""

    exit_code = 6


class EnvironmentFault(FinetuneError):
    """The machine: disk, permission, network, a device that is not there."""

    exit_code = 7


class ProcessLost(EnvironmentFault):
    """Another process of the run has ended, or cannot be reached."""


def as_lost_process(error: BaseException) -> ProcessLost | None:
    """The user's error for gloo's or NCCL's word that another process is gone; else None."""
    is_loss = type(error).__name__ in ("DistBackendError", "DistNetworkError") or "gloo/transport" in str(error)
    if not is_loss:
        return None
    return ProcessLost("another process of the run has ended", hint="see what ended it")


class ProcessFailed(FinetuneError):
    """What ended one of several processes, and with it the run; the exit code is that of its own error."""

    def __init__(
        self, what: str, *, code: int = 1, traceback: str = "", where: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.exit_code = code
        self.traceback = traceback

    def lines(self) -> list[str]:
        """The message, and below it the traceback if it is a bug."""
        return [*super().lines(), *self.traceback.splitlines()]


class Stopped(FinetuneError):
    """A signal ended the run in good order: it goes on from a checkpoint when it is started again."""

    exit_code = 75  # EX_TEMPFAIL: the one code after which a scheduler should try again


class Interrupted(FinetuneError):
    """A signal ended the run before there was anything to go on from."""

    exit_code = 128 + signal.SIGINT

    def __init__(
        self, what: str, *, number: int = signal.SIGINT, where: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.exit_code = 128 + number

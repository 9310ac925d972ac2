"""The run directory: every path that a run reads or writes is made here."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from finetune.errors import (
    EnvironmentFault,
    FinetuneError,
    Interrupted,
    ProcessLost,
    RefusedError,
    Stopped,
    UsageError,
    as_lost_process,
    as_out_of_memory,
)
from finetune.run.distributed import Rank
from finetune.run.events import Recorded
from finetune.run.signals import StopRequested
from finetune.storage.files import UNFINISHED, disk_faults, read_json, write_json, write_text

logger = logging.getLogger(__name__)

FORMAT = 1
"""Layout of the directory; raised when it changes."""

TRAINED_RECORD = "ft_adapter.json"
"""Beside trained weights: what they are, and what they belong to."""

LOOKS = 3
SECONDS_OF_A_LOOK = 0.05

INTERRUPTED = 130
"""Exit code of a run that Ctrl-C ended."""


@dataclass
class Attempt:
    """How far a run has come.

    Attributes:
        steps: Optimizer steps that are done.
        checkpoint: Steps of the newest checkpoint, from which the run could go on.
    """

    steps: int = 0
    checkpoint: int | None = None


class RunDirectory:
    """`runs/<name>/`: recipe, provenance, metrics, log, outcome, checkpoints, trained weights, what was made of them.

    Made by `create` for a new run and by `open` for one that is there.

    Args:
        path: Of the directory.
        is_writer: Whether this process writes it; of several processes of a run only the main one does.
    """

    def __init__(self, path: Path, is_writer: bool = True) -> None:
        self.path = path
        self.is_writer = is_writer
        self.marker = path / "run.json"
        self.recipe_as_written = path / "recipe.yaml"
        self.recipe = path / "recipe.resolved.yaml"
        self.provenance = path / "provenance.json"
        self.data_report = path / "data_report.json"
        self.metrics = path / "metrics.jsonl"
        self.ranks_picture = path / "ranks.svg"
        self.report = path / "report.html"
        self.log = path / "log.txt"
        self.lock = path / "lock"
        self.checkpoints = path / "checkpoints"
        self.outcome = path / "exit.json"
        self.merged = path / "merged"
        self.exported = path / "exported"
        self.evaluation = path / "eval"
        self.trackers = path / "trackers"
        self._unwritten: list[str] = []

    @classmethod
    def create(cls, path: Path, overwrite: bool = False) -> RunDirectory:
        """Claim `path` for a new run.

        Args:
            path: Must not exist, or be empty.
            overwrite: Remove a run that is there; anything else is left alone.

        Raises:
            RefusedError: Something is there already, or another process trains or claims it.
            EnvironmentFault: The directory cannot be made.
        """
        run = cls(path.absolute())
        was_there = path.exists()
        try:
            if overwrite and run.marker.is_file() and not path.is_symlink():
                with run._locked():
                    shutil.rmtree(path)
            run._refuse_if_used()
            path.mkdir(parents=True, exist_ok=True)
            with run.marker.open("x", encoding="utf-8") as file:
                file.write(json.dumps({"format": FORMAT, "created": now()}) + "\n")
        except FileExistsError as error:
            raise RefusedError(
                "another process has just taken the run directory", where=str(path), hint="choose another --run-dir"
            ) from error
        except OSError as error:
            with suppress(OSError):  # leave nothing that looks like a run
                run.marker.unlink(missing_ok=True)
                if not was_there:
                    path.rmdir()
            raise EnvironmentFault(
                f"the run directory cannot be written: {error.strerror}",
                where=str(path),
                hint="choose another with --run-dir or run.directory",
            ) from error
        return run

    @classmethod
    def open(cls, path: Path, is_writer: bool = True) -> RunDirectory:
        """The run in `path`.

        Args:
            path: Of the directory.
            is_writer: Whether this process writes it.

        Raises:
            UsageError: There is none.
        """
        run = cls(path.absolute(), is_writer)
        if not run.marker.is_file():
            runs = sorted(file.parent.name for file in path.parent.glob("*/run.json"))
            hint = f"runs in {path.parent}: {', '.join(runs)}" if runs else "train one first: ft train recipe.yaml"
            raise UsageError("this is no run directory", where=str(path), hint=hint)
        return run

    @staticmethod
    def free_path(wanted: Path) -> Path:
        """`wanted`, or the first of `wanted-2`, `wanted-3`, ... that is not taken."""
        path, number = wanted, 1
        while os.path.lexists(path):
            number += 1
            path = wanted.with_name(f"{wanted.name}-{number}")
        return path

    def trained(self, is_whole_model: bool) -> Path:
        """Where the trained weights are: `adapter/`, or `model/` where every weight trained."""
        return self.path / ("model" if is_whole_model else "adapter")

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        return read_json(self.outcome).get("code") == 0

    @property
    def is_locked(self) -> bool:
        """Whether a process trains the run just now."""
        if not self.lock.is_file():
            return False
        with self.lock.open("r", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError:  # a file system without locks: nobody can tell
                return False
        return False

    def begin(self, recipe: str, metrics_bytes: int) -> None:
        """Make ready for an attempt: what an earlier one wrote past its last checkpoint is set aside.

        Args:
            recipe: The resolved recipe.
            metrics_bytes: Length of `metrics.jsonl` at the checkpoint that the run goes on from; 0 without one.
        """
        self.remove_leftovers()
        with disk_faults(self.path):
            self._rewind_metrics(metrics_bytes)
            if self.provenance.is_file():
                self.provenance.rename(self._set_aside(self.provenance))
            self.outcome.unlink(missing_ok=True)
        write_text(self.recipe, recipe)

    def remove_leftovers(self) -> None:
        """Remove what a killed process was about to put in its place."""
        with disk_faults(self.path):
            for entry in self.path.iterdir():
                if UNFINISHED.fullmatch(entry.name):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def append_metrics(self, record: Recorded) -> None:
        """Add a line to `metrics.jsonl` and hand it to the operating system.

        On a disk that is full the line waits for the next one: it is not worth a run.
        """
        self._unwritten.append(json.dumps(record.to_json()) + "\n")
        try:
            self._write_metrics()
        except EnvironmentFault as fault:
            if len(self._unwritten) == 1:
                logger.warning("%s: %s; what belongs there is kept in memory for now", self.metrics.name, fault.what)

    def sync_metrics(self) -> int:
        """Put `metrics.jsonl` on the disk for good; returns its length in bytes.

        Raises:
            EnvironmentFault: There is no room for it.
        """
        self._write_metrics()
        with disk_faults(self.metrics), self.metrics.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def _write_metrics(self) -> None:
        """Write the lines that are waiting: all of them, or none."""
        lines = "".join(self._unwritten).encode()
        with disk_faults(self.metrics), self.metrics.open("ab", buffering=0) as file:
            end = file.tell()
            if file.write(lines) < len(lines):  # as much as there was room for
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._unwritten.clear()

    def _rewind_metrics(self, size_bytes: int) -> None:
        """Cut `metrics.jsonl` to its length at a checkpoint; the lines past it move to `metrics.attempt-N.jsonl`."""
        found = self.metrics.stat().st_size if self.metrics.is_file() else 0
        if found < size_bytes:
            logger.warning("%s: %d bytes are lost; training goes on without them", self.metrics, size_bytes - found)
        if found <= size_bytes:
            return
        with self.metrics.open("r+b") as file:
            file.seek(size_bytes)
            self._set_aside(self.metrics).write_bytes(file.read())
            file.truncate(size_bytes)

    def _set_aside(self, file: Path) -> Path:
        """The first free name of the kind `metrics.attempt-1.jsonl`."""
        number = 1
        while (path := file.with_name(f"{file.stem}.attempt-{number}{file.suffix}")).exists():
            number += 1
        return path

    @contextmanager
    def attempt(self) -> Iterator[Attempt]:
        """The time in which a run trains, and no other process may: `exit.json` tells afterwards how it ended.

        A new run that fails before its first step leaves nothing behind, so that its name is free for the next try;
        a run that is refused to go on keeps its record as it was. A process that is not the run's writer takes part
        without the lock and tells nothing.

        Raises:
            RefusedError: Another process trains the run.
            Stopped: A signal ended the run, and it can go on from a checkpoint.
            Interrupted: A signal ended the run before there was one.
        """
        with self._locked() if self.is_writer else nullcontext():
            attempt = Attempt()
            is_new = not self.recipe.is_file()
            try:
                yield attempt
            except StopRequested as request:
                raise self._stop(attempt, request, is_new) from None
            except FinetuneError as error:
                if is_new or not isinstance(error, RefusedError):
                    self._end(attempt, error.exit_code, error.what, is_new)
                raise
            except KeyboardInterrupt:
                self._end(attempt, INTERRUPTED, "interrupted", is_new)
                raise
            except Exception as error:
                known = as_out_of_memory(error) or as_lost_process(error)
                if known is None:  # a bug: keep all that could explain it
                    self._write_outcome(attempt, 1, f"{type(error).__name__}: {error}")
                    raise
                self._end(attempt, known.exit_code, known.what, is_new)
                raise known from error
            self._write_outcome(attempt, 0, "done")

    def _stop(self, attempt: Attempt, request: StopRequested, is_new: bool) -> Stopped | Interrupted:
        """Write down that a signal ended the run, and make the error that says so."""
        if attempt.checkpoint is not None:
            attempt.steps = attempt.checkpoint
            self._write_outcome(attempt, Stopped.exit_code, f"stopped {request}")
            return Stopped(f"{request} after step {attempt.checkpoint}, which is saved", hint=self.resume_command)
        interrupted = Interrupted(f"{request} before anything could be saved", number=request.number)
        self._end(attempt, interrupted.exit_code, interrupted.what, is_new)
        return interrupted

    def correct_outcome(self, error: FinetuneError) -> None:
        """Put what ended a run of several processes in the place of its main process's word that another was lost."""
        if not self.outcome.is_file():
            return
        known = json.loads(self.outcome.read_text(encoding="utf-8"))
        if known["code"] == ProcessLost.exit_code:
            with suppress(EnvironmentFault):
                write_json(self.outcome, {**known, "code": error.exit_code, "message": error.what})

    @property
    def resume_command(self) -> str:
        """The command that goes on with the run, in as many processes."""
        here = Path.cwd()
        path = self.path.relative_to(here) if here in self.path.parents else self.path
        rank = Rank.here()
        more = f" --processes {rank.count_here}" if rank.count_here > 1 else ""
        if rank.count > rank.count_here:
            more += f" --nodes {rank.count // rank.count_here} --rendezvous HOST:PORT"
        return f"go on with it: ft train --resume {path}{more}"

    def _end(self, attempt: Attempt, code: int, message: str, is_new: bool) -> None:
        if not self.is_writer:
            return
        if attempt.steps or attempt.checkpoint is not None:
            self._write_outcome(attempt, code, message)
        elif is_new:
            shutil.rmtree(self.path, ignore_errors=True)

    def _write_outcome(self, attempt: Attempt, code: int, message: str) -> None:
        """Write how the attempt ended; where it failed and this cannot be written either, the failure is what counts.

        Raises:
            EnvironmentFault: The run came to its end, and nobody could see that.
        """
        if not self.is_writer:
            return
        ending = {"code": code, "step": attempt.steps, "resumable": bool(code) and attempt.checkpoint is not None}
        try:
            write_json(self.outcome, {**ending, "checkpoint": attempt.checkpoint, "message": message, "ended": now()})
        except EnvironmentFault as fault:
            if not code:
                raise
            logger.warning("%s %s", self.outcome.name, fault.what)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes out; the system takes the lock away when the process ends, however it does.

        Processes that tokenize do not inherit it: Python opens files so that they stay with who opened them.
        """
        with disk_faults(self.lock):
            file = self.lock.open("a+", encoding="utf-8")
        with file:
            try:
                self._take(file)
            except BlockingIOError:
                raise self._is_held() from None
            except OSError as error:  # a network file system without locks
                logger.warning("%s cannot be locked (%s): let only one process train it", self.path, error.strerror)
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now()}
            if not self.lock.exists() or not os.path.samestat(os.fstat(file.fileno()), self.lock.stat()):
                raise RefusedError("the run has just been removed", where=str(self.path), hint="train it again")
            with suppress(OSError):  # on a full disk others do not learn who it is, but are kept out
                file.truncate(0)
                os.write(file.fileno(), json.dumps(holder).encode() + b"\n")
            yield

    @staticmethod
    def _take(file: TextIO) -> None:
        """Lock a file. Who looks whether it is locked holds it for a moment, and is waited for."""
        for _ in range(LOOKS):
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(SECONDS_OF_A_LOOK)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _is_held(self) -> RefusedError:
        try:
            holder = json.loads(self.lock.read_text(encoding="utf-8"))
            who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):  # it has just begun, or somebody wrote there
            who = "another process"
        return RefusedError(f"the run is being trained by {who}", where=str(self.path), hint="wait for it, or stop it")

    def _refuse_if_used(self) -> None:
        if self.path.is_symlink():
            raise RefusedError(
                "the run directory is a symbolic link", where=str(self.path), hint="give the folder that it points to"
            )
        if not self.path.exists():
            return
        if not self.path.is_dir() or any(self.path.iterdir()):
            is_run = self.marker.is_file()
            raise RefusedError(
                "a run is there already" if is_run else "the run directory is not empty, and holds no run",
                where=str(self.path),
                hint="choose another --run-dir" + (", or replace it with --overwrite" if is_run else ""),
            )


def now() -> str:
    """The time as RFC 3339 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")

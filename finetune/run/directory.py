"""The run directory: the only place that knows the paths which a run reads or writes."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from finetune.errors import (
    EnvironmentFault,
    FinetuneError,
    Interrupted,
    ProcessLost,
    RefusedError,
    Stopped,
    UsageError,
    as_machine_fault,
)
from finetune.run.checkpoints import Checkpoints
from finetune.run.distributed import Rank
from finetune.run.events import Recorded
from finetune.run.lock import holder_of, is_locked, locked
from finetune.run.outcome import read_outcome
from finetune.run.provenance import now
from finetune.run.signals import StopRequested, interrupted_exit_code
from finetune.storage.files import UNFINISHED, check_writable, disk_faults, write_json, write_text
from finetune.storage.opening import open_to_read, open_to_write, write_new

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the directory's layout; increased when the layout changes."""

TRAINED_RECORD = "ft_adapter.json"
"""File beside trained weights: method, recipe and fingerprint of the base that they belong to."""


@dataclass
class Attempt:
    """Progress of one attempt at training a run.

    Attributes:
        steps: Optimizer steps done.
        checkpoint: Step of the newest checkpoint, from which the run can resume; None without one.
    """

    steps: int = 0
    checkpoint: int | None = None


class RunDirectory:
    """`runs/<name>/`: recipe, provenance, metrics, log, outcome, tokenizer, checkpoints, trained weights, exports.

    `create` makes a new run, `open` returns an existing one.

    Args:
        path: The directory.
        is_writer: Whether this process writes into it; among the processes of a run only the main one does.
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
        self.tokenizer = path / "tokenizer"
        self.outcome = path / "exit.json"
        self.merged = path / "merged"
        self.exported = path / "exported"
        self.evaluation = path / "eval"
        self.trackers = path / "trackers"
        self._unwritten: list[str] = []
        self._held: BinaryIO | None = None  # the lock of a new run, until its attempt ends

    @classmethod
    def create(cls, path: Path, overwrite: bool = False) -> RunDirectory:
        """Claim `path` for a new run.

        Args:
            path: Must not exist, be empty, or hold a run that failed before its first step, which is removed.
            overwrite: Remove an existing run; a folder that is not a run is never removed.

        Raises:
            RefusedError: The path is taken, or another process trains or claims it.
            EnvironmentFault: The directory cannot be created.
        """
        run = cls(path.absolute())
        was_there = path.exists()
        try:
            is_replaceable = run.marker.is_file() and not path.is_symlink()
            if is_replaceable and (overwrite or run._failed_before_first_step):
                with locked(run.lock):
                    shutil.rmtree(path)
            run._refuse_if_used()
            path.mkdir(parents=True, exist_ok=True)
            # The lock decides between two processes that both found the path free, and keeps out one with `overwrite`.
            run._held = locked(run.lock)
            with open_to_write(run.marker, "xb") as file:
                file.write(json.dumps({"format": FORMAT, "created": now()}).encode() + b"\n")
        except FileExistsError as error:
            raise RefusedError(
                "another process has just taken the run directory", where=str(path), hint="choose another --run-dir"
            ) from error
        except (OSError, EnvironmentFault) as error:
            with suppress(OSError):  # a marker without a run would block the name
                run.marker.unlink(missing_ok=True)
                if not was_there:
                    run.lock.unlink(missing_ok=True)
                    path.rmdir()
            reason = error.strerror if isinstance(error, OSError) else error.what
            raise EnvironmentFault(
                f"the run directory cannot be written: {reason}",
                where=str(path),
                hint="choose another with --run-dir or run.directory",
            ) from error
        return run

    @classmethod
    def open(cls, path: Path, is_writer: bool = True) -> RunDirectory:
        """The run in `path`.

        Args:
            path: The directory.
            is_writer: Whether this process writes into it.

        Raises:
            UsageError: There is no run.
        """
        run = cls(path.absolute(), is_writer)
        if not run.marker.is_file():
            runs = sorted(file.parent.name for file in path.parent.glob("*/run.json"))
            hint = f"runs in {path.parent}: {', '.join(runs)}" if runs else "train one first: ft train recipe.yaml"
            raise UsageError("this is not a run directory", where=str(path), hint=hint)
        return run

    @staticmethod
    def free_path(wanted: Path) -> Path:
        """`wanted`, or the first of `wanted-2`, `wanted-3`, ... that is not taken."""
        path, number = wanted, 1
        while os.path.lexists(path):
            number += 1
            path = wanted.with_name(f"{wanted.name}-{number}")
        return path

    def export_folder(self, format: str, type: str = "") -> Path:
        """Default folder of an export: each format, and each type of its weights, has one."""
        return self.exported / (f"{format}-{type}" if type else format)

    def trained(self, is_whole_model: bool) -> Path:
        """Folder of the trained weights: `adapter/`, or `model/` after full fine-tuning."""
        return self.path / ("model" if is_whole_model else "adapter")

    @property
    def is_finished(self) -> bool:
        """Whether the run completed all its steps."""
        return read_outcome(self.outcome).get("code") == 0

    @property
    def is_locked(self) -> bool:
        """Whether a process is training the run."""
        return is_locked(self.lock)

    @property
    def _failed_before_first_step(self) -> bool:
        """Whether an attempt has ended with an error, and nothing was ever trained."""
        outcome = read_outcome(self.outcome)
        if not outcome.get("code") or outcome.get("step") or outcome.get("checkpoint") is not None:
            return False
        if Checkpoints(self.checkpoints).any_committed:
            return False
        return not any(map(_has_steps, self.path.glob("metrics*.jsonl")))

    @contextmanager
    def removed_unless_attempted(self) -> Iterator[None]:
        """If the block raises before an attempt began, such as while libraries load, remove the new directory again."""
        try:
            yield
        except BaseException:
            has_begun = self.recipe.is_file() or self.outcome.is_file() or (self._held is None and self.is_locked)
            if self.is_writer and not has_begun:
                shutil.rmtree(self.path, ignore_errors=True)
            raise

    def begin(self, recipe: str, metrics_bytes: int) -> None:
        """Prepare for an attempt: metrics past the checkpoint move to `metrics.attempt-N.jsonl`.

        Args:
            recipe: The resolved recipe.
            metrics_bytes: Length of `metrics.jsonl` at the checkpoint that the run resumes from; 0 without one.
        """
        self.remove_leftovers()
        with disk_faults(self.path):
            self._rewind_metrics(metrics_bytes)
            if self.provenance.is_file():
                self.provenance.rename(self._set_aside(self.provenance))
        with disk_faults(self.outcome):
            self.outcome.unlink(missing_ok=True)
        write_text(self.recipe, recipe)

    def remove_leftovers(self) -> None:
        """Remove temporary files and folders of a killed process."""
        with disk_faults(self.path):
            for entry in self.path.iterdir():
                if UNFINISHED.fullmatch(entry.name):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def append_metrics(self, record: Recorded) -> None:
        """Append a line to `metrics.jsonl` and flush it to the operating system.

        On a full disk the line stays in memory until the next call: a missing metric must not end a run.
        """
        self._unwritten.append(json.dumps(record.to_json()) + "\n")
        try:
            self._write_metrics()
        except EnvironmentFault as fault:
            if len(self._unwritten) == 1:
                logger.warning("%s: %s; its lines are kept in memory for now", self.metrics.name, fault.what)

    def sync_metrics(self) -> int:
        """Fsync `metrics.jsonl`; returns its length in bytes.

        Raises:
            EnvironmentFault: The disk is full.
        """
        self._write_metrics()
        with disk_faults(self.metrics), open_to_write(self.metrics, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def _write_metrics(self) -> None:
        """Write all pending lines, or none."""
        lines = "".join(self._unwritten).encode()
        with disk_faults(self.metrics), open_to_write(self.metrics, "ab", buffering=0) as file:
            end = file.tell()
            if file.write(lines) < len(lines):  # unbuffered: a full disk takes a part, and half a line is not JSON
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._unwritten.clear()

    def _rewind_metrics(self, size_bytes: int) -> None:
        """Cut `metrics.jsonl` to its length at a checkpoint; the lines past it move to `metrics.attempt-N.jsonl`."""
        found = self.metrics.stat().st_size if self.metrics.is_file() else 0
        if found < size_bytes:
            logger.warning("%s: %d bytes are lost; training continues without them", self.metrics, size_bytes - found)
        if found <= size_bytes:
            return
        with open_to_write(self.metrics, "r+b") as file:
            file.seek(size_bytes)
            write_new(self._set_aside(self.metrics), file.read())
            file.truncate(size_bytes)

    def _set_aside(self, file: Path) -> Path:
        """The first free name like `metrics.attempt-1.jsonl`."""
        number = 1
        while (path := file.with_name(f"{file.stem}.attempt-{number}{file.suffix}")).exists():
            number += 1
        return path

    @contextmanager
    def attempt(self) -> Iterator[Attempt]:
        """Train under the lock of the run; afterwards `exit.json` records the exit code and the reason.

        A new run that fails before its first step is removed, so that its name is free again. A resume that is
        refused leaves `exit.json` unchanged. A process that is not the run's writer neither locks nor records.

        Raises:
            RefusedError: Another process trains the run, or a file or folder of the run is a symbolic link.
            EnvironmentFault: The disk is full or read-only.
            Stopped: A signal ended the run after a checkpoint, from which it can resume.
            Interrupted: A signal ended the run before its first checkpoint.
        """
        self.refuse_links()
        with self._locked() if self.is_writer else nullcontext():
            attempt = Attempt()
            is_new = not self.recipe.is_file()  # `begin` writes it
            try:
                if self.is_writer:
                    check_writable(self.outcome)  # before rows are read and a model is loaded
                yield attempt
            except StopRequested as request:
                raise self._stop(attempt, request, is_new) from None
            except FinetuneError as error:
                if is_new or not isinstance(error, RefusedError):
                    self._end(attempt, error.exit_code, error.what, is_new)
                raise
            except KeyboardInterrupt as interrupt:
                self._end(attempt, interrupted_exit_code(interrupt), "interrupted", is_new)
                raise
            except Exception as error:
                known = as_machine_fault(error)
                if known is None:  # a bug: keep the directory, its log may explain it
                    self._write_outcome(attempt, 1, f"{type(error).__name__}: {error}")
                    raise
                self._end(attempt, known.exit_code, known.what, is_new)
                raise known from error
            self._write_outcome(attempt, 0, "done")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock, which a new run holds since its creation."""
        held, self._held = self._held or locked(self.lock), None
        with held:
            yield

    def _stop(self, attempt: Attempt, request: StopRequested, is_new: bool) -> Stopped | Interrupted:
        """Record that a signal ended the run; returns the error to raise."""
        if attempt.checkpoint is not None:
            attempt.steps = attempt.checkpoint  # later steps are lost: the run resumes from here
            self._write_outcome(attempt, Stopped.exit_code, f"stopped {request}")
            return Stopped(f"{request} after step {attempt.checkpoint}, which is saved", hint=self.resume_command)
        interrupted = Interrupted(f"{request} before anything could be saved", number=request.number)
        self._end(attempt, interrupted.exit_code, interrupted.what, is_new)
        return interrupted

    def correct_outcome(self, error: FinetuneError) -> None:
        """Record the root cause in place of the consequence that the main process recorded.

        When another rank fails, the main process only learns that a process was lost (`ProcessLost`).
        """
        if not self.outcome.is_file():
            return
        known = read_outcome(self.outcome)
        if known.get("code") == ProcessLost.exit_code:  # any other code is a root cause itself
            with suppress(EnvironmentFault):
                write_json(self.outcome, {**known, "code": error.exit_code, "message": error.what})

    @property
    def resume_command(self) -> str:
        """A hint with the command that resumes the run on the same number of processes."""
        rank = Rank.here()
        more = f" --processes {rank.count_here}" if rank.count_here > 1 else ""
        if rank.count > rank.count_here:
            more += f" --nodes {rank.count // rank.count_here} --rendezvous HOST:PORT"
        return f"resume it: ft train --resume {self._short_path}{more}"

    @property
    def _short_path(self) -> Path:
        """The path for commands: relative to the working directory where it is below it."""
        here = Path.cwd()
        return self.path.relative_to(here) if here in self.path.parents else self.path

    def unfinished(self, what: str = "the run has no trained weights: it did not finish") -> UsageError:
        """The error of a command that needs a finished run.

        Args:
            what: The problem, unless a process trains the run.
        """
        if self.is_locked:
            who, way = holder_of(self.lock), f"wait until it is finished: ft watch {self._short_path}"
            return UsageError(f"the run is in training, by {who}", where=str(self.path), hint=way)
        return UsageError(what, where=str(self.path), hint=self.resume_command)

    def _end(self, attempt: Attempt, code: int, message: str, is_new: bool) -> None:
        if not self.is_writer:
            return
        if attempt.steps or attempt.checkpoint is not None:
            self._write_outcome(attempt, code, message)
        elif is_new:
            shutil.rmtree(self.path, ignore_errors=True)

    def _write_outcome(self, attempt: Attempt, code: int, message: str) -> None:
        """Write `exit.json`.

        Raises:
            EnvironmentFault: It cannot be written, although the run succeeded. After a failure that is only a warning:
                the failure itself is the error to report.
        """
        if not self.is_writer:
            return
        outcome = {"code": code, "step": attempt.steps, "resumable": bool(code) and attempt.checkpoint is not None}
        try:
            write_json(self.outcome, {**outcome, "checkpoint": attempt.checkpoint, "message": message, "ended": now()})
        except EnvironmentFault as fault:
            if not code:
                raise
            logger.warning("%s %s", self.outcome.name, fault.what)

    def refuse_links(self) -> None:
        """Refuse a run directory from which training would write to other folders of the user.

        Raises:
            RefusedError: A file or folder in it is a symbolic link.
        """
        for entry in sorted(self.path.iterdir()):
            if entry.is_symlink():
                raise RefusedError(
                    "the run directory contains a symbolic link, and training would write to what it points to",
                    where=str(entry),
                    hint="copy the run with cp -rL, which replaces links by files, and resume the copy",
                )

    def _refuse_if_used(self) -> None:
        if self.path.is_symlink():
            raise RefusedError(
                "the run directory is a symbolic link", where=str(self.path), hint="name the folder that it points to"
            )
        if not self.path.exists():
            return
        if not self.path.is_dir() or any(entry != self.lock for entry in self.path.iterdir()):
            is_run = self.marker.is_file()
            raise RefusedError(
                "a run is there already" if is_run else "the run directory is not empty and is not a run",
                where=str(self.path),
                hint="choose another --run-dir" + (", or replace it with --overwrite" if is_run else ""),
            )


def _has_steps(metrics: Path) -> bool:
    with open_to_read(metrics) as lines:
        return any(b'"event": "step"' in line for line in lines)

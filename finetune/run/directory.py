"""The run directory: every path that a run reads or writes is made here."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from finetune.errors import EnvironmentFault, FinetuneError, RefusedError, UsageError, as_out_of_memory
from finetune.run.events import StepMetrics, Validated

FORMAT = 1
"""Layout of the directory; raised when it changes."""


INTERRUPTED = 130
"""Exit code of a run that Ctrl-C ended."""


@dataclass
class Attempt:
    """How far a run has come.

    Attributes:
        steps: Optimizer steps that are done.
    """

    steps: int = 0


class RunDirectory:
    """`runs/<name>/`: recipe, provenance, metrics, log, outcome, trained weights, what was made of them.

    Made by `create` for a new run and by `open` for one that is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.marker = path / "run.json"
        self.recipe_as_written = path / "recipe.yaml"
        self.recipe = path / "recipe.resolved.yaml"
        self.provenance = path / "provenance.json"
        self.data_report = path / "data_report.json"
        self.metrics = path / "metrics.jsonl"
        self.log = path / "log.txt"
        self.outcome = path / "exit.json"
        self.merged = path / "merged"
        self.exported = path / "exported"
        self.evaluation = path / "eval"

    @classmethod
    def create(cls, path: Path, overwrite: bool = False) -> RunDirectory:
        """Claim `path` for a new run.

        Args:
            path: Must not exist, or be empty.
            overwrite: Remove a run that is there; anything else is left alone.

        Raises:
            RefusedError: Something is there already, or another process claims it at the same time.
            EnvironmentFault: The directory cannot be made.
        """
        run = cls(path.absolute())
        try:
            if overwrite and run.marker.is_file() and not path.is_symlink():
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
            raise EnvironmentFault(
                f"the run directory cannot be written: {error.strerror}",
                where=str(path),
                hint="choose another with --run-dir or run.directory",
            ) from error
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """The run in `path`.

        Raises:
            UsageError: There is none.
        """
        run = cls(path.absolute())
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

    def append_metrics(self, record: StepMetrics | Validated) -> None:
        """Add a line to `metrics.jsonl` and hand it to the operating system."""
        with disk_faults(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.to_json()) + "\n")

    @contextmanager
    def attempt(self) -> Iterator[Attempt]:
        """The time in which a run trains: `exit.json` tells afterwards how it ended.

        A run that fails before its first step leaves nothing behind, so that its name is free for the next try.
        """
        attempt = Attempt()
        try:
            yield attempt
        except FinetuneError as error:
            self._end(attempt, error.exit_code, error.what)
            raise
        except KeyboardInterrupt:
            self._end(attempt, INTERRUPTED, "interrupted")
            raise
        except Exception as error:
            shortage = as_out_of_memory(error)
            if shortage is None:  # a bug: keep all that could explain it
                self._write_outcome(attempt, 1, f"{type(error).__name__}: {error}")
                raise
            self._end(attempt, shortage.exit_code, shortage.what)
            raise shortage from error
        self._write_outcome(attempt, 0, "done")

    def _end(self, attempt: Attempt, code: int, message: str) -> None:
        if attempt.steps:
            self._write_outcome(attempt, code, message)
        else:
            shutil.rmtree(self.path, ignore_errors=True)

    def _write_outcome(self, attempt: Attempt, code: int, message: str) -> None:
        write_json(self.outcome, {"code": code, "step": attempt.steps, "message": message, "ended": now()})

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


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that readers see the old one or the new one, never a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with disk_faults(path):
            aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A folder to write into that becomes `target` when the block ends well, and vanishes when it does not.

    Folder and files get the permissions that the umask allows, whatever a library gave them.

    Raises:
        EnvironmentFault: The disk is full or the folder cannot be written.
    """
    aside = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        with disk_faults(target):
            aside.mkdir(parents=True)
            yield aside
            _open_to_readers(aside)
            _put_in_place(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """Turn what the operating system and safetensors say of a full or closed disk into an EnvironmentFault."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise EnvironmentFault(
            f"cannot be written: {reason}", where=str(path), hint="check free space and permissions"
        ) from error


def _open_to_readers(folder: Path) -> None:
    """Give every file the permissions of a new one: those of `folder`, which is new, without the right to search."""
    allowed = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(allowed)


def _put_in_place(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`; a folder that is there is removed only after that."""
    if target.is_symlink() or not target.is_dir():
        folder.rename(target)
        return
    retired = folder.with_name(f"{folder.name}-old")
    target.rename(retired)
    folder.rename(target)
    shutil.rmtree(retired, ignore_errors=True)

"""Distributed runs: the rank of this process, and the error file in which it reports why it ended.

Usually one rank fails and the others end because of it. Each writes a `RankExit`; the launcher reports the root cause
and drops the consequences:

| what happened to a rank         | `RankExit` in its error file          | role         |
| ------------------------------- | ------------------------------------- | ------------ |
| an error of ft, or a bug        | `code`, `what`, `traceback` of a bug  | root cause   |
| a signal                        | `is_stop`                             | root cause   |
| a collective lost another rank  | `is_consequence` (`ProcessLost`)      | consequence  |
| killed (SIGKILL, out of memory) | none: the launcher has only the code  | root cause   |
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from finetune.errors import FinetuneError, Interrupted, ProcessFailed, ProcessLost, Stopped
from finetune.run.signals import interrupted_exit_code
from finetune.storage.opening import read_json, read_text, write_new

LAUNCHER = "FT_LAUNCHER"
"""Environment variable: process id of the `ft train` that launched this rank."""

LAUNCH = "FT_LAUNCH"
"""Environment variable: a temporary folder of that launcher, removed when it ends."""

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable: the file in which PyTorch's launchers expect the error of a rank."""

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h: the signal that a process gets when its parent ends."""


@dataclass(frozen=True)
class Rank:
    """Rank and world size of this process.

    Attributes:
        number: The rank, from 0; 0 is the main process, the only one that writes files and prints.
        count: World size: processes of the run.
        count_here: Local world size: those on this machine.
    """

    number: int = 0
    count: int = 1
    count_here: int = 1

    @classmethod
    def here(cls) -> Rank:
        """Read from the environment of any launcher that sets RANK and WORLD_SIZE (ft, torchrun), or of Slurm."""
        _translate_slurm()
        count = int(os.environ.get("WORLD_SIZE", 1))
        here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
        return cls(int(os.environ.get("RANK", 0)), count, here) if count > 1 else cls()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.number == 0


def _translate_slurm() -> None:
    """Set PyTorch's variables from those of a Slurm step; a batch script by itself is not a task of a step."""
    found = os.environ
    if "RANK" in found or int(found.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return
    found["RANK"], found["WORLD_SIZE"] = found["SLURM_PROCID"], found["SLURM_STEP_NUM_TASKS"]
    found["LOCAL_RANK"] = found["SLURM_LOCALID"]
    found["LOCAL_WORLD_SIZE"] = re.split(r"[(,]", found["SLURM_STEP_TASKS_PER_NODE"])[0]
    found.setdefault("MASTER_ADDR", first_host(found["SLURM_STEP_NODELIST"]))
    # All tasks must agree on a port without communication: derive it from the job id.
    found.setdefault("MASTER_PORT", str(20_000 + int(found["SLURM_JOB_ID"]) % 20_000))


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: gpu07 for `gpu[07-09,12],login`."""
    first = re.match(r"[^,\[]+(\[[^\]]*\][^,\[]*)*|\[", nodes)
    name = first.group() if first else nodes
    return re.sub(r"\[([^\]]*)\]", lambda ranges: re.split("[-,]", ranges.group(1))[0], name)


def has_launcher() -> bool:
    """Whether an `ft train` launched this process; the launcher then prints its errors."""
    return LAUNCHER in os.environ


def exit_with_launcher() -> None:
    """Have the kernel kill this process when its launcher ends, even by SIGKILL; Linux only."""
    if not has_launcher() or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[LAUNCHER]):  # the launcher ended before prctl: no signal will come
        os._exit(Interrupted.exit_code)


def launch_folder() -> Path | None:
    """The temporary folder of this process's launcher; None without a launcher."""
    return Path(os.environ[LAUNCH]) if has_launcher() else None


def published_run_dir(launch: Path) -> Path | None:
    """The run directory that the main process of a launch has published; None before that."""
    try:
        return Path(read_text(launch / "run"))
    except OSError:
        return None


def publish_run_dir(launch: Path, directory: Path) -> None:
    """Publish the run directory to the launcher, and to restarts within the same launch, which resume there."""
    write_new(launch / "run", str(directory))


@dataclass(frozen=True)
class RankExit:
    """Why a rank ended, as written to its error file.

    Attributes:
        rank: Number of the rank.
        code: Exit code.
        what: As in FinetuneError.
        where: As in FinetuneError.
        hint: As in FinetuneError.
        is_stop: Whether a signal ended it regularly.
        is_consequence: Whether it ended only because another rank had: see the table above.
        traceback: Traceback of a bug; empty for errors of ft.
        timestamp: Seconds since 1970.
    """

    rank: int
    code: int
    what: str
    where: str | None = None
    hint: str | None = None
    is_stop: bool = False
    is_consequence: bool = False
    traceback: str = ""
    timestamp: float = 0.0

    @classmethod
    def of(cls, error: BaseException) -> RankExit:
        """The record of an error that leaves the command."""
        rank, now = Rank.here().number, time.time()
        if isinstance(error, KeyboardInterrupt):
            return cls(rank, interrupted_exit_code(error), "interrupted", is_stop=True, timestamp=now)
        if not isinstance(error, FinetuneError):
            text = "".join(traceback.format_exception(error))
            return cls(rank, 1, f"{type(error).__name__}: {error}", traceback=text, timestamp=now)
        has_custom_lines = type(error).lines is not FinetuneError.lines  # such as a recipe with several problems
        return cls(
            rank,
            code=error.exit_code,
            what="\n".join(error.lines()) if has_custom_lines else error.what,
            where=error.where,
            hint=error.hint,
            is_stop=isinstance(error, Stopped | Interrupted),
            is_consequence=isinstance(error, ProcessLost),
            timestamp=now,
        )

    @classmethod
    def read(cls, file: Path) -> RankExit | None:
        """The record that `write` wrote; None if there is none, or a broken one."""
        try:
            return cls(**read_json(file)["ending"])
        except (OSError, ValueError, KeyError, TypeError):  # the rank was killed before or during the write
            return None

    def write(self) -> None:
        """Write the error file if a launcher asks for one; torchrun shows `message` and `timestamp`."""
        if file := os.environ.get(ERROR_FILE):
            record = {"message": self.traceback or self.what, "timestamp": int(self.timestamp), "ending": asdict(self)}
            write_new(Path(file), json.dumps(record))

    def error(self) -> FinetuneError:
        """The error that the launcher raises for this rank."""
        if self.code == Stopped.exit_code:
            return Stopped(self.what, where=self.where, hint=self.hint)
        if self.is_stop:
            return Interrupted(self.what, number=self.code - 128, where=self.where, hint=self.hint)
        where = f"process {self.rank}" + (f": {self.where}" if self.where else "")
        return ProcessFailed(self.what, code=self.code, traceback=self.traceback, where=where, hint=self.hint)

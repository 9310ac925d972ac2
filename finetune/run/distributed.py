"""Several processes of one run: which of them this one is, and how it tells what ended it."""

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

SUPERVISOR = "FT_SUPERVISOR"
"""Environment variable: process id of the `ft train` that started this process as a rank of its run."""

LAUNCH = "FT_LAUNCH"
"""Environment variable: a folder of that `ft train`, for as long as it lives."""

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable: where PyTorch's launchers look for what ended a rank."""

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Rank:
    """Which process of its run this one is.

    Attributes:
        number: From 0; 0 is the main process, the only one that writes and speaks.
        count: Processes of the run.
        count_here: Of these, the ones on this machine.
    """

    number: int = 0
    count: int = 1
    count_here: int = 1

    @classmethod
    def here(cls) -> Rank:
        """As a launcher says in the environment: ours, torchrun, Slurm, or any that sets RANK and WORLD_SIZE."""
        _translate_slurm()
        count = int(os.environ.get("WORLD_SIZE", 1))
        here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
        return cls(int(os.environ.get("RANK", 0)), count, here) if count > 1 else cls()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.number == 0


def _translate_slurm() -> None:
    """Say in PyTorch's words what Slurm says to the tasks of a step; a batch script itself is no task of one."""
    found = os.environ
    if "RANK" in found or int(found.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return
    found["RANK"], found["WORLD_SIZE"] = found["SLURM_PROCID"], found["SLURM_STEP_NUM_TASKS"]
    found["LOCAL_RANK"] = found["SLURM_LOCALID"]
    found["LOCAL_WORLD_SIZE"] = re.split(r"[(,]", found["SLURM_STEP_TASKS_PER_NODE"])[0]
    found.setdefault("MASTER_ADDR", first_host(found["SLURM_STEP_NODELIST"]))
    found.setdefault("MASTER_PORT", str(20_000 + int(found["SLURM_JOB_ID"]) % 20_000))


def first_host(nodes: str) -> str:
    """The first of Slurm's list of machines: `gpu[07-09,12],login` begins with gpu07."""
    first = re.match(r"[^,\[]+(\[[^\]]*\][^,\[]*)*|\[", nodes)
    name = first.group() if first else nodes
    return re.sub(r"\[([^\]]*)\]", lambda ranges: re.split("[-,]", ranges.group(1))[0], name)


def has_launcher() -> bool:
    """Whether an `ft train` started this process, and tells its errors."""
    return SUPERVISOR in os.environ


def exit_with_launcher() -> None:
    """Let the system kill this process when its supervisor ends, however that ends; on Linux alone."""
    if not has_launcher() or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[SUPERVISOR]):  # it had ended already
        os._exit(Interrupted.exit_code)


def launch_folder() -> Path | None:
    """A folder of this process's supervisor, for as long as that lives."""
    return Path(os.environ[LAUNCH]) if has_launcher() else None


def published_run_dir(launch: Path) -> Path | None:
    """The run directory that the main process of a launch chose; None before it did."""
    try:
        return Path((launch / "run").read_text(encoding="utf-8"))
    except OSError:
        return None


def publish_run_dir(launch: Path, directory: Path) -> None:
    """Let later starts of the same launch go on in this directory, and the supervisor know it."""
    (launch / "run").write_text(str(directory), encoding="utf-8")


@dataclass(frozen=True)
class RankExit:
    """What ended a rank, as it stands in the file that launchers read.

    Attributes:
        rank: Its number.
        code: Exit code.
        what: As in FinetuneError.
        where: As in FinetuneError.
        hint: As in FinetuneError.
        is_stop: Whether a signal ended it in good order.
        is_consequence: Whether it ended because another process had.
        traceback: Of a bug; empty otherwise.
        timestamp: When, in seconds since 1970.
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
        """What an error that leaves the command comes to."""
        rank, now = Rank.here().number, time.time()
        if isinstance(error, KeyboardInterrupt):
            return cls(rank, Interrupted.exit_code, "interrupted", is_stop=True, timestamp=now)
        if not isinstance(error, FinetuneError):
            told = "".join(traceback.format_exception(error))
            return cls(rank, 1, f"{type(error).__name__}: {error}", traceback=told, timestamp=now)
        has_lines_of_its_own = type(error).lines is not FinetuneError.lines  # as a recipe with several problems
        return cls(
            rank,
            code=error.exit_code,
            what="\n".join(error.lines()) if has_lines_of_its_own else error.what,
            where=error.where,
            hint=error.hint,
            is_stop=isinstance(error, Stopped | Interrupted),
            is_consequence=isinstance(error, ProcessLost),
            timestamp=now,
        )

    @classmethod
    def read(cls, file: Path) -> RankExit | None:
        """What `write` wrote; None where nothing is."""
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8"))["ending"])
        except (OSError, ValueError, KeyError, TypeError):  # killed before it could, or while it did
            return None

    def write(self) -> None:
        """Leave it where the launcher looks, if one does; `message` and `timestamp` are what torchrun shows."""
        if file := os.environ.get(ERROR_FILE):
            told = {"message": self.traceback or self.what, "timestamp": int(self.timestamp), "ending": asdict(self)}
            Path(file).write_text(json.dumps(told), encoding="utf-8")

    def error(self) -> FinetuneError:
        """The error that the supervisor raises in its stead."""
        if self.code == Stopped.exit_code:
            return Stopped(self.what, where=self.where, hint=self.hint)
        if self.is_stop:
            return Interrupted(self.what, number=self.code - 128, where=self.where, hint=self.hint)
        where = f"process {self.rank}" + (f": {self.where}" if self.where else "")
        return ProcessFailed(self.what, code=self.code, traceback=self.traceback, where=where, hint=self.hint)

"""A function or a command in a process of its own, with a time limit and its output in a file."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

MODULE = "tests.benchmarks.gpu_run"
"""The functions that `call` runs; it imports PyTorch and ft, which takes seconds."""


class ProcessFailure(Exception):
    """A process has failed, or ran past its time limit."""


def call(function: str, task: dict[str, Any], log: Path, timeout: float, device: str) -> None:
    """Run a function of `MODULE` in a fresh process.

    On a GPU the process imports everything anew, because CUDA does not survive a fork. On a CPU it is forked from a
    server that has imported it already, which saves seconds of each case in CI.

    Raises:
        ProcessFailure: See `ProcessFailure`.
    """
    context = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
    if device == "cpu":
        context.set_forkserver_preload([MODULE])
    process = context.Process(target=_run, args=(function, task, str(log)))
    process.start()
    assert process.pid is not None
    try:
        process.join(timeout)
        is_late = process.is_alive()
    finally:  # after Ctrl-C too: the process is in a session of its own
        _kill_group(process.pid)
        process.kill()  # it may not lead a group yet
        process.join()
    if is_late:
        raise ProcessFailure(f"timed out after {timeout:.0f} s")
    if process.exitcode != 0:
        raise ProcessFailure(f"exit status {process.exitcode}")


def command(arguments: list[str], log: Path, timeout: float) -> None:
    """Run a command from the repository's root.

    Raises:
        ProcessFailure: See `ProcessFailure`.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *_python_path()])}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise ProcessFailure(f"timed out after {timeout:.0f} s") from error
        finally:
            _kill_group(process.pid)
            process.kill()
            process.wait()
    if status:
        raise ProcessFailure(f"exit status {status}")


def last_lines(log: Path, count: int = 20) -> list[str]:
    """The end of a log; none where there is no log."""
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:] if log.is_file() else []


def _python_path() -> list[str]:
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


def _kill_group(leader: int) -> None:
    """Kill a process and those that it has started, such as compilers."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _run(function: str, task: dict[str, Any], log: str) -> None:
    """In the process."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    getattr(import_module(MODULE), function)(task)

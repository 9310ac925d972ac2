"""Run as a module: forks a process for each requested training, so that torch is imported once.

A line of JSON on standard input starts one: `arguments` of `ft`, and faults to inject. A line on standard output
gives its process id, and another one, when it has ended, its exit code, negative for a signal.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import finetune.jobs.export.merge
import finetune.jobs.train.run  # noqa: F401 -- takes seconds to import
from cli.main import app
from finetune.run import checkpoints

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate", "os.chmod"}
"""Audit events of Python's own file operations, each raised before the operation is done."""


def kill_before(number: int, folder: str) -> None:
    """Die by SIGKILL before the `number`th operation, counted from 1, that changes something below `folder`."""
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in CHANGES or not isinstance(arguments[0], str | os.PathLike):
            return
        if event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if os.fspath(arguments[0]).startswith(folder):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def slow_disk(seconds: float) -> None:
    """Let every sync of a checkpoint take a while."""
    sync = checkpoints.sync

    def sync_slowly(path: Any) -> None:
        time.sleep(seconds)
        sync(path)

    checkpoints.sync = sync_slowly


def limit_memory(more: int) -> None:
    """Allow the process that many bytes of addresses beyond those that it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run(request: dict[str, Any]) -> None:
    """Train in this process, which ends with it."""
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
    with open(request["errors"], "a") as errors:
        os.dup2(errors.fileno(), 2)
    if "slow_disk" in request:
        slow_disk(request["slow_disk"])
    if "kill_before" in request:
        kill_before(*request["kill_before"])
    if "more_memory" in request:
        limit_memory(request["more_memory"])
    try:
        app(request["arguments"])
    except SystemExit as end:
        os._exit(int(end.code or 0))


def main() -> None:
    """Serve until standard input ends."""
    print("ready", flush=True)  # noqa: T201
    for line in sys.stdin:
        child = os.fork()
        if not child:
            run(json.loads(line))
        print(child, flush=True)  # noqa: T201
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()

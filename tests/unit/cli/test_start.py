"""Re-execution of the command with a better allocator: same process id, arguments and input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli import start
from cli.start import BETTER_ALLOCATORS, NO_REEXEC, NO_SMALL_CHUNK_CACHE, PRELOADED, TUNABLES

ROOT = Path(__file__).parents[3]
STARTED = Path("/proc/self/environ")
SCRIPT = f"""
import json, os, sys
from cli.start import reexec_with_allocator
reexec_with_allocator()
colons = open({str(STARTED)!r}).read().replace(chr(0), ":")  # glibc splits the variable's value in place
found = colons.partition({TUNABLES + "="!r})[2]
preloaded = os.environ.get({PRELOADED!r})
print(json.dumps([found, os.getpid(), sys.argv, sys.flags.utf8_mode, sys.stdin.read(), preloaded]))
"""

pytestmark = pytest.mark.skipif(not STARTED.exists(), reason="/proc exists on Linux only")


def started(**variables: str) -> tuple[list[Any], int]:
    environment = {key: value for key, value in os.environ.items() if key not in (TUNABLES, PRELOADED, NO_REEXEC)}
    command = [sys.executable, "-X", "utf8", "-c", SCRIPT, "train", "a b"]
    with subprocess.Popen(
        command,
        env={**environment, "PYTHONPATH": str(ROOT), **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        output, _ = process.communicate(b"answers", timeout=60)
    assert process.returncode == 0
    return json.loads(output), process.pid


def test_reexec_keeps_process_id_arguments_flags_and_input():
    found, pid = started()
    assert found[0].startswith(f"{NO_SMALL_CHUNK_CACHE}:")
    assert found[1:5] == [pid, ["-c", "train", "a b"], 1, "answers"]


def test_reexec_preloads_an_installed_allocator(tmp_path: Path):
    (tmp_path / BETTER_ALLOCATORS[0]).symlink_to(find_loaded("libm.so"))
    found, _ = started(LD_LIBRARY_PATH=str(tmp_path))
    assert found[5] == BETTER_ALLOCATORS[0]


def test_better_allocator_is_none_if_none_is_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(start, "BETTER_ALLOCATORS", ("libnowhere.so.1",))
    assert start.better_allocator() is None


@pytest.mark.parametrize("variable", [TUNABLES, PRELOADED])
def test_reexec_keeps_variables_of_the_user(variable: str, tmp_path: Path):
    (tmp_path / BETTER_ALLOCATORS[0]).symlink_to(find_loaded("libm.so"))
    user_value = {TUNABLES: "glibc.malloc.arena_max=2", PRELOADED: ""}[variable]
    found, _ = started(LD_LIBRARY_PATH=str(tmp_path), **{variable: user_value})
    tunables = user_value if variable == TUNABLES else NO_SMALL_CHUNK_CACHE
    assert found[0].startswith(f"{tunables}:")
    assert not found[5]


@pytest.mark.parametrize(("value", "is_off"), [("1", True), ("0", False), ("", False)])
def test_reexec_is_off_with_ft_no_reexec(value: str, is_off: bool):
    found, _ = started(**{NO_REEXEC: value})
    assert (found[0].startswith(NO_SMALL_CHUNK_CACHE)) is not is_off


def find_loaded(name: str) -> str:
    """Path of a library that this process has loaded, by the beginning of its file name."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return next(path for line in lines if (path := line.split()[-1]).rpartition("/")[2].startswith(name))

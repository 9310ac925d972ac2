"""The command runs with an allocator that was settled before it started, in the same process, as it was given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli import start
from cli.start import BETTER_ALLOCATORS, NO_CHUNKS_KEPT_BACK, PRELOADED, TUNABLES

ROOT = Path(__file__).parents[3]
STARTED = Path("/proc/self/environ")
SCRIPT = f"""
import json, os, sys
from cli.start import reexec_with_allocator
reexec_with_allocator()
colons = open({str(STARTED)!r}).read().replace(chr(0), ":")  # glibc has cut the value at its own
found = colons.partition({TUNABLES + "="!r})[2]
preloaded = os.environ.get({PRELOADED!r})
print(json.dumps([found, os.getpid(), sys.argv, sys.flags.utf8_mode, sys.stdin.read(), preloaded]))
"""

pytestmark = pytest.mark.skipif(not STARTED.exists(), reason="what a process was started with is told on Linux")


def started(**variables: str) -> tuple[list[Any], int]:
    environment = {key: value for key, value in os.environ.items() if key not in (TUNABLES, PRELOADED)}
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


def test_the_process_goes_on_settled_with_its_number_arguments_and_input():
    found, pid = started()
    assert found[0].startswith(f"{NO_CHUNKS_KEPT_BACK}:")
    assert found[1:5] == [pid, ["-c", "train", "a b"], 1, "answers"]


def test_an_allocator_that_is_installed_is_taken(tmp_path: Path):
    (tmp_path / BETTER_ALLOCATORS[0]).symlink_to(find_loaded("libm.so"))
    found, _ = started(LD_LIBRARY_PATH=str(tmp_path))
    assert found[5] == BETTER_ALLOCATORS[0]


def test_without_one_it_is_the_systems_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(start, "BETTER_ALLOCATORS", ("libnowhere.so.1",))
    assert start.better_allocator() is None


@pytest.mark.parametrize("variable", [TUNABLES, PRELOADED])
def test_what_the_user_has_set_stays(variable: str, tmp_path: Path):
    (tmp_path / BETTER_ALLOCATORS[0]).symlink_to(find_loaded("libm.so"))
    own = {TUNABLES: "glibc.malloc.arena_max=2", PRELOADED: ""}[variable]
    found, _ = started(LD_LIBRARY_PATH=str(tmp_path), **{variable: own})
    of_glibc = own if variable == TUNABLES else NO_CHUNKS_KEPT_BACK
    assert found[0].startswith(f"{of_glibc}:")
    assert not found[5]


def find_loaded(name: str) -> str:
    """A library of this process, by how its file's name begins."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return next(path for line in lines if (path := line.split()[-1]).rpartition("/")[2].startswith(name))

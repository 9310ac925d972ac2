"""File and network access of full commands, as the kernel sees it, including libraries in C, C++ and Rust.

strace tells of every file that is changed, every connection and every program; a control shows that it would.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.fixtures.recipes import write_recipe

from .conftest import ROOT

pytestmark = pytest.mark.slow

OPENING = "open,openat,openat2,creat"
CHANGING = (
    "mkdir,mkdirat,rmdir,rename,renameat,renameat2,unlink,unlinkat,link,linkat,symlink,symlinkat,truncate,"
    "chmod,fchmodat,chown,fchownat,lchown,mknod,mknodat,utimensat"
)
NETWORK = "connect,bind,sendto,sendmsg,sendmmsg"
DEVICES = ("/dev/null", "/dev/tty", "/dev/shm")
"""The last one is memory, where Python's locks between processes are."""

PROGRAMS = {Path(sys.executable).name, "uname"}
"""Python itself, and what its `platform` module asks."""


class Deeds(NamedTuple):
    """What a command did.

    Attributes:
        changed: Files and folders that it made, wrote to, moved or removed.
        reached: Calls that use the network.
        started: Programs.
    """

    changed: set[Path]
    reached: list[str]
    started: set[str]


def watched(folder: Path, *command: str | Path, **environment: str) -> Deeds:
    """Run a command in `folder` and watch it, its threads and its children."""
    trace = folder / "trace"
    trace.mkdir()
    calls = ",".join((OPENING, CHANGING, NETWORK, "execve"))
    options = ["-ff", "--seccomp-bpf", "-y", "-s", "4096", "-e", "signal=none", "-e", f"trace={calls}"]
    keep = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    done = subprocess.run(
        ["strace", *options, "-o", str(trace / "of"), *map(str, command)],
        cwd=folder,
        env={**keep, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for file in trace.iterdir() for line in file.read_text(errors="replace").splitlines()]
    shutil.rmtree(trace)
    return deeds(lines, folder)


def deeds(lines: list[str], folder: Path) -> Deeds:
    """Read the lines of traces of processes that began in `folder` and stayed there."""
    changed: set[Path] = set()
    reached, started = [], set()
    for line in lines:
        call = line.partition("(")[0]
        if call in NETWORK.split(","):
            reached += [line] if "AF_INET" in line else []
        elif " = -1 " in line:
            continue
        elif call == "execve":
            started.add(Path(quoted(line)[0]).name)
        elif call in CHANGING.split(",") or re.search(r"O_WRONLY|O_RDWR|O_CREAT|^creat", line):
            changed.update(folder / path for path in paths(line, folder))
    return Deeds(changed, reached, started)


def paths(line: str, folder: Path) -> Iterator[str]:
    """The paths in a call: each starts at the folder of the descriptor before it, if there is one."""
    for start, path in re.findall(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"', line):
        yield os.path.normpath(os.path.join(start or folder, path))


def quoted(line: str) -> list[str]:
    return re.findall(r'"((?:[^"\\]|\\.)*)"', line)


@pytest.fixture(scope="module", autouse=True)
def _strace() -> None:
    if (
        not shutil.which("strace")
        or subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True).returncode
    ):
        pytest.skip("there is no strace here, or it may not watch")


def strays(found: Deeds, *roots: Path) -> list[Path]:
    allowed = (*roots, *map(Path, DEVICES))
    return sorted(path for path in found.changed if not any(path.is_relative_to(root) for root in allowed))


STRAY = """
import ctypes, socket, subprocess, sys
libc = ctypes.CDLL(None)
libc.creat(b"stray", 0o600)
libc.rename(b"stray", b"moved")
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("127.0.0.1", 9))
subprocess.run(["true"])
"""


def test_audit_finds_a_planted_write_and_connection(tmp_path: Path):
    found = watched(tmp_path, sys.executable, "-c", STRAY)
    assert strays(found, tmp_path / "run") == [tmp_path / "moved", tmp_path / "stray"]
    assert any("127.0.0.1" in call for call in found.reached)
    assert "true" in found.started


def test_commands_write_only_to_their_folders_and_use_no_network(tiny_recipe: dict[str, Any], tmp_path: Path):
    """With a model and data on the disk, and without being told that it is offline."""
    recipe = write_recipe(tiny_recipe, tmp_path)
    run, cache, temporary, home = (tmp_path / name for name in ("run", "cache", "temporary", "home"))
    for folder in (temporary, home):
        folder.mkdir()
    places = {"HOME": str(home), "TMPDIR": str(temporary), "FT_CACHE": str(cache)}
    for arguments in (("preview", recipe), ("train", recipe, "--run-dir", run), ("eval", run), ("merge", run)):
        found = watched(tmp_path, sys.executable, "-m", "cli", *arguments, **places)
        assert strays(found, run, cache, temporary) == [], arguments
        assert found.reached == [], arguments
        assert any(path.is_relative_to(run) for path in found.changed) or arguments[0] == "preview"
        assert found.started <= PROGRAMS, arguments
    assert not list(home.iterdir())

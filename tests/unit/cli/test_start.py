"""The command runs with an allocator that was settled before it started, in the same process, as it was given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.start import NO_CHUNKS_KEPT_BACK, TUNABLES

ROOT = Path(__file__).parents[3]
STARTED = Path("/proc/self/environ")
SCRIPT = f"""
import json, os, sys
from cli.start import settle_allocator
settle_allocator()
colons = open({str(STARTED)!r}).read().replace(chr(0), ":")  # glibc has cut the value at its own
found = colons.partition({TUNABLES + "="!r})[2]
print(json.dumps([found, os.getpid(), sys.argv, sys.flags.utf8_mode, sys.stdin.read()]))
"""

pytestmark = pytest.mark.skipif(not STARTED.exists(), reason="what a process was started with is told on Linux")


def started(**variables: str) -> tuple[list[Any], int]:
    environment = {key: value for key, value in os.environ.items() if key != TUNABLES}
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
    assert found[1:] == [pid, ["-c", "train", "a b"], 1, "answers"]


def test_what_the_user_has_set_stays():
    found, _ = started(**{TUNABLES: "glibc.malloc.arena_max=2"})
    assert found[0].startswith("glibc.malloc.arena_max=2:")

"""A small file system that another program fills to the last byte during training.

The file system is mounted where only the test's own processes see it, which takes a Linux that lets users do so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from .conftest import ROOT, Result

SCRIPT = """
mount -t tmpfs -o size=4m tmpfs "$DISK" || exit 99
"$PYTHON" -m cli train "$RECIPE" --run-dir "$DISK/run" > "$OUT/first.txt" 2>&1 &
until [ -d "$DISK/run/checkpoints/step-00000003" ]; do sleep 0.005; done
[ "$FILLS" = yes ] && cat /dev/zero > "$DISK/filler" 2> "$OUT/full.txt"
wait $!
echo $? > "$OUT/first.code"
cp -r "$DISK/run" "$OUT/first"
"$PYTHON" -m cli train "$RECIPE" --resume auto --run-dir "$DISK/run" > "$OUT/again.txt" 2>&1
echo $? > "$OUT/again.code"
"$PYTHON" -m cli train "$RECIPE" --run-dir "$DISK/other" > "$OUT/other.txt" 2>&1
echo $? > "$OUT/other.code"
[ -e "$DISK/other" ] && cp -r "$DISK/other" "$OUT/other"
rm -f "$DISK/filler"
"$PYTHON" -m cli train "$RECIPE" --resume auto --run-dir "$DISK/run" > "$OUT/second.txt" 2>&1
echo $? > "$OUT/second.code"
cp -r "$DISK/run" "$OUT/second"
"""


class Attempt(NamedTuple):
    """What a command came to."""

    code: int
    said: str
    run: Path


def on_a_small_disk(recipe: Path, folder: Path, fills: bool) -> list[Attempt]:
    """Train while the disk fills, then the same and another run on it, and the first once more after room was made."""
    disk, out = folder / "disk", folder / "out"
    disk.mkdir()
    out.mkdir()
    places = {"DISK": disk, "OUT": out, "RECIPE": recipe, "PYTHON": sys.executable, "FILLS": "yes" if fills else "no"}
    environment = {**os.environ, **{name: str(value) for name, value in places.items()}, "PYTHONPATH": str(ROOT)}
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", SCRIPT]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not fills or "No space left" in (out / "full.txt").read_text()
    return [
        Attempt(int((out / f"{name}.code").read_text()), (out / f"{name}.txt").read_text(), out / name)
        for name in ("first", "again", "other", "second")
    ]


@pytest.fixture(scope="module", autouse=True)
def _mounts(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("mount")
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    if not shutil.which("unshare") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this machine lets a user mount nothing")


@pytest.mark.slow
def test_run_on_a_full_file_system_ends_as_uninterrupted(recipe: Path, uninterrupted: Result, tmp_path: Path):
    first, again, other, last = on_a_small_disk(recipe, tmp_path, fills=True)
    for attempt in (first, again, other):
        assert attempt.code == 7, attempt.said
        assert "No space left" in attempt.said
        assert "Traceback" not in attempt.said
    assert not other.run.exists()
    assert last.code == 0, last.said
    assert "resumed after step 3" in last.said
    assert Result.of(last.run) == uninterrupted


@pytest.mark.slow
def test_run_on_the_same_file_system_with_space_has_no_warnings(recipe: Path, uninterrupted: Result, tmp_path: Path):
    attempts = on_a_small_disk(recipe, tmp_path, fills=False)
    assert [attempt.code for attempt in attempts] == [0] * 4
    assert "warning" not in attempts[0].said
    assert Result.of(attempts[0].run) == uninterrupted

"""Disks that are read-only or nearly full: commands end with 7 and the path before rows are read or a model is loaded.

A limit on the size of files stands for a disk with a few KB left. Read-only disks are mounted where only the test's own
processes see them, which takes a Linux that lets users do so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from finetune.jobs.load.context import ModelSetup

from .conftest import ROOT, Originals
from .damage import copied
from .test_disk import largest_file

ROOM = 8192
"""Bytes: enough for small files of a run, such as its marker."""


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def commands(run: Path, stopped: Path, originals: Originals, new: Path) -> dict[str, tuple[list[object], Path]]:
    """Arguments of commands that write, and the path that they name."""
    return {
        "train": (["train", originals.recipe, "--run-dir", new], new),
        "train --overwrite": (["train", originals.recipe, "--run-dir", stopped, "--overwrite"], stopped),
        "train --resume": (["train", "--resume", stopped], stopped),
        "sweep": (["sweep", originals.sweep_recipe, "--sweep-dir", new], new),
        "eval": (["eval", run], run / "eval"),
        "eval --output": (["eval", run, "--output", new], new),
        "merge": (["merge", run, "--overwrite"], run / "merged"),
        "export": (["export", run, "--format", "adapter", "--overwrite"], run / "exported" / "adapter"),
        "generate --output": (["generate", run, "-p", "hello", "--output", new], new),
        "reproduce": (["reproduce", run, "--run-dir", new], new),
    }


@pytest.mark.parametrize("name", commands(Path(), Path(), Originals(*[Path()] * 5), Path()))
def test_command_on_a_nearly_full_disk_exits_with_7_before_any_work(
    name: str, originals: Originals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, stopped = (copied(each, tmp_path / each.name) for each in (originals.finished, originals.stopped))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    arguments, where = commands(run, stopped, originals, tmp_path / "new")[name]

    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("it finds its model")

    monkeypatch.setattr(ModelSetup, "find", work)
    with largest_file(ROOM):
        result = invoke(*arguments, "--quiet")
    assert result.exit_code == 7, (result.exception, result.stderr)
    assert str(where) in result.stderr
    if name != "train --overwrite":  # the old run is removed, as was asked for
        left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert {path for path in left if left[path] != before.get(path)} <= {stopped / "lock", stopped / "log.txt"}
        assert before.keys() <= left.keys()


def test_same_commands_find_their_model_where_there_is_room(originals: Originals, tmp_path: Path, monkeypatch: Any):
    """The control: the check before the work is what ends them."""
    run = copied(originals.finished, tmp_path / "run")

    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("it finds its model")

    monkeypatch.setattr(ModelSetup, "find", work)
    with pytest.raises(AssertionError, match="it finds its model"):
        raise invoke("eval", run, "--quiet").exception


def test_report_that_cannot_be_refreshed_is_a_warning(originals: Originals, tmp_path: Path):
    """As on a disk that became read-only: the results go elsewhere, and the run stays as it is."""
    run, output = copied(originals.finished, tmp_path / "run"), tmp_path / "output"
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = invoke("eval", run, "--output", output, "--limit", 2, "--quiet")
    assert result.exit_code == 0, result.stderr
    assert "warning: report.html is not written" in result.stderr
    assert sorted(path.name for path in output.iterdir()) == ["generations.jsonl", "results.json"]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    refused = invoke("report", run)
    assert (refused.exit_code, str(run / "report.html") in refused.stderr) == (7, True)


SCRIPT = """
mount -t tmpfs -o size=64m tmpfs "$DISK" || exit 99
cp -r "$RUN" "$DISK/run"; cp -r "$STOPPED" "$DISK/stopped"; cp -r "$SWEEP" "$DISK/sweep"
mount -o remount,ro "$DISK"
exec "$PYTHON" -m tests.faults.test_disk_before_work
"""

ON_READ_ONLY_DISKS = {
    "train {recipe} --run-dir {disk}/new": 7,
    "train {recipe} --run-dir {disk}/run --overwrite": 7,
    "train --resume {disk}/stopped": 7,
    "train --resume {disk}/run": 0,
    "eval {disk}/run": 7,
    "eval {disk}/run --output {out}/eval": 0,
    "merge {disk}/run --overwrite": 7,
    "merge {disk}/run --output {out}/merged": 0,
    "export {disk}/run --format adapter --overwrite": 7,
    "export {disk}/run --format adapter --output {out}/adapter": 0,
    "generate {disk}/run -p hello --max-new-tokens 1": 0,
    "generate {disk}/run -p hello --output {disk}/answers.jsonl": 7,
    "report {disk}/run": 7,
    "report {disk}/run --output {out}/page.html": 0,
    "runs --directory {disk}": 0,
    "runs clean --directory {disk} --yes": 7,
    "watch {disk}/run": 0,
    "diff {disk}/run {disk}/stopped": 0,
    "reproduce {disk}/run": 7,
    "sweep {sweep_recipe} --sweep-dir {disk}/sweep --set sweep.trials=3": 7,
    "sweep {sweep_recipe} --sweep-dir {disk}/other": 7,
}
"""Commands and their exit codes."""


@pytest.mark.slow
def test_commands_on_a_read_only_disk_exit_with_7_or_do_without_it(originals: Originals, tmp_path: Path):
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    out.mkdir()
    _skip_without_mounts(disk)
    places = {"disk": disk, "out": out, "recipe": originals.recipe, "sweep_recipe": originals.sweep_recipe}
    expected = {name.format(**places): code for name, code in ON_READ_ONLY_DISKS.items()}
    runs = {"RUN": originals.finished, "STOPPED": originals.stopped, "SWEEP": originals.sweep}
    environment = {**runs, "DISK": disk, "PYTHON": sys.executable, "PYTHONPATH": ROOT}
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", SCRIPT],
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        input=json.dumps(list(expected)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def exit_codes(names: list[str]) -> dict[str, int | str]:
    """The exit code of each command, or the exception that it raises."""
    results = {name: invoke(*name.split()) for name in names}
    return {
        name: result.exit_code if isinstance(result.exception, (SystemExit, type(None))) else repr(result.exception)
        for name, result in results.items()
    }


def _skip_without_mounts(folder: Path) -> None:
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    if not shutil.which("unshare") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this machine lets a user mount nothing")


if __name__ == "__main__":  # in the namespace where the disk is mounted
    sys.stdout.write(json.dumps(exit_codes(json.load(sys.stdin))))

"""The lock of a run: one process trains at a time."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from threading import Timer

import pytest

from finetune.errors import RefusedError
from finetune.run import lock as module
from finetune.run.directory import RunDirectory


def train(run: RunDirectory, steps: int) -> None:
    with run.attempt() as attempt:
        attempt.steps = steps


def started_run(path: Path) -> RunDirectory:
    """A run with an earlier attempt."""
    run = RunDirectory.create(path)
    run.begin("seed: 1", 0)
    train(run, 3)
    return run


def test_lock_refuses_second_process_and_names_holder(tmp_path: Path):
    run = started_run(tmp_path / "run")
    with run.attempt(), pytest.raises(RefusedError, match=rf"process {os.getpid()} on .*, since \d") as caught:
        train(RunDirectory.open(run.path), 1)
    assert caught.value.where == str(run.path)
    train(run, 4)


def test_lock_refuses_overwrite_of_run_in_training(tmp_path: Path):
    run = started_run(tmp_path / "run")
    with run.attempt(), pytest.raises(RefusedError, match="is being trained"):
        RunDirectory.create(run.path, overwrite=True)
    assert run.recipe.is_file()


def test_lock_waits_for_reader_that_only_checks(tmp_path: Path):
    run = started_run(tmp_path / "run")
    with run.lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        Timer(0.02, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        with run.attempt():
            assert run.is_locked


def test_lock_content_does_not_matter(tmp_path: Path):
    run = started_run(tmp_path / "run")
    run.lock.write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "long ago"}))
    train(run, 4)
    with run.attempt():
        run.lock.write_text("[]")
        with pytest.raises(RefusedError, match="trained by another process"):
            train(RunDirectory.open(run.path), 1)


def test_lock_of_killed_process_is_released(tmp_path: Path):
    run = started_run(tmp_path / "run")
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with run.attempt():
            os.write(writing, b"held")
            signal.pause()
    os.read(reading, 4)
    with pytest.raises(RefusedError, match=f"process {child} on"):
        train(run, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    train(run, 4)


def test_lock_is_not_inherited_by_child_program(tmp_path: Path):
    run = started_run(tmp_path / "run")
    with run.attempt():
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        train(run, 4)
    finally:
        child.kill()
        child.wait()


def test_lock_of_removed_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = started_run(tmp_path / "run")
    lock = module.fcntl.flock
    monkeypatch.setattr(module.fcntl, "flock", lambda *arguments: (shutil.rmtree(run.path), lock(*arguments)))
    with pytest.raises(RefusedError, match="just removed"):
        train(run, 1)


def test_lock_unsupported_by_file_system_only_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    run = started_run(tmp_path / "run")
    monkeypatch.setattr(module.fcntl, "flock", refuse)
    train(run, 4)
    assert "cannot be locked (No locks available)" in caplog.text

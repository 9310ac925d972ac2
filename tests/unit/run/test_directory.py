"""A run directory belongs to one run, tells how the run ended, and never holds half of anything."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

import pytest
import torch
from safetensors.torch import save_file

from finetune.errors import (
    DataError,
    DivergedError,
    EnvironmentFault,
    FinetuneError,
    Interrupted,
    RefusedError,
    Stopped,
    UsageError,
)
from finetune.run import directory as module
from finetune.run.directory import INTERRUPTED, RunDirectory
from finetune.run.events import StepMetrics, ValidationResult
from finetune.run.signals import StopRequested
from finetune.storage.files import write_json, written_aside


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask() -> Iterator[None]:
    """A umask of 027: the group may read, others may not."""
    before = os.umask(0o027)
    yield
    os.umask(before)


# Claiming


def test_a_new_run_gets_a_marked_directory_with_its_parents(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "a" / "b" / "run")
    assert json.loads(run.marker.read_text())["format"] == 1
    assert RunDirectory.open(run.path).path == run.path


def test_an_empty_folder_may_become_a_run(tmp_path: Path):
    (tmp_path / "run").mkdir()
    assert RunDirectory.create(tmp_path / "run").marker.is_file()


def test_a_run_is_not_written_over_unless_asked(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    run.log.write_text("old")
    with pytest.raises(RefusedError, match="a run is there already") as caught:
        RunDirectory.create(run.path)
    assert "--overwrite" in str(caught.value.hint)
    assert run.log.read_text() == "old"
    RunDirectory.create(run.path, overwrite=True)
    assert names_in(run.path) == ["run.json"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path, overwrite: bool):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(RefusedError, match="holds no run") as caught:
        RunDirectory.create(tmp_path / "thesis", overwrite)
    assert "--overwrite" not in str(caught.value.hint)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_left_alone(tmp_path: Path, overwrite: bool):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RefusedError):
        RunDirectory.create(tmp_path / "run", overwrite)
    assert (tmp_path / "run").read_text() == "a file"


@pytest.mark.parametrize("target", ["run", "empty", "nowhere"])
def test_a_symbolic_link_is_refused_and_what_it_points_to_left_alone(tmp_path: Path, target: str):
    RunDirectory.create(tmp_path / "run").log.write_text("old")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(RefusedError, match="symbolic link"):
        RunDirectory.create(tmp_path / "link", overwrite=True)
    assert (tmp_path / "run" / "log.txt").read_text() == "old"
    assert names_in(tmp_path) == ["empty", "link", "run"]


def test_of_two_processes_that_claim_a_directory_at_once_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    RunDirectory.create(tmp_path / "run")
    monkeypatch.setattr(RunDirectory, "_refuse_if_used", lambda run: None)  # as if it had looked a moment earlier
    with pytest.raises(RefusedError, match="another process"):
        RunDirectory.create(tmp_path / "run")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_cannot_be_made_is_a_fault_of_the_machine(tmp_path: Path, overwrite: bool):
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match="cannot be written") as caught:
        RunDirectory.create(tmp_path / "file" / "run", overwrite)
    assert "--run-dir" in str(caught.value.hint)


def test_opening_what_is_no_run_names_the_runs_beside_it(tmp_path: Path):
    with pytest.raises(UsageError, match="no run directory") as caught:
        RunDirectory.open(tmp_path / "third")
    assert "ft train" in str(caught.value.hint)
    RunDirectory.create(tmp_path / "first")
    RunDirectory.create(tmp_path / "second")
    with pytest.raises(UsageError) as caught:
        RunDirectory.open(tmp_path / "third")
    assert str(caught.value.hint).endswith(": first, second")


def test_a_free_path_is_the_wanted_one_or_the_first_with_a_number(tmp_path: Path):
    wanted = tmp_path / "run"
    found = []
    for _ in range(3):
        path = RunDirectory.free_path(wanted)
        found.append(path.name)
        RunDirectory.create(path)
    assert found == ["run", "run-2", "run-3"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert RunDirectory.free_path(tmp_path / "link").name == "link-2"


# How a run ends


def end_of(run: RunDirectory, steps: int, error: BaseException | None, checkpoint: int | None = None) -> None:
    with run.attempt() as attempt:
        attempt.steps, attempt.checkpoint = steps, checkpoint
        if error is not None:
            raise error


@pytest.mark.parametrize("error", [DataError("bad row"), KeyboardInterrupt()])
def test_a_run_that_fails_before_its_first_step_leaves_nothing_behind(tmp_path: Path, error: BaseException):
    run = RunDirectory.create(tmp_path / "run")
    run.log.write_text("reading the data")
    with pytest.raises(type(error)):
        end_of(run, steps=0, error=error)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DivergedError("the loss is not finite", where="step 8"), 5, "the loss is not finite"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted"),
        (None, 0, "done"),
    ],
)
def test_a_run_that_took_steps_stays_and_tells_how_it_ended(
    tmp_path: Path, error: BaseException | None, code: int, message: str
):
    run = RunDirectory.create(tmp_path / "run")
    run.log.write_text("step 1")
    if error is None:
        end_of(run, 7, None)
    else:
        with pytest.raises(type(error)):
            end_of(run, 7, error)
    outcome = json.loads(run.outcome.read_text())
    assert (outcome["code"], outcome["step"], outcome["message"]) == (code, 7, message)
    assert outcome["ended"].endswith("+00:00")
    assert run.log.read_text() == "step 1"


def test_a_bug_keeps_its_traceback_and_what_was_written(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    with pytest.raises(ZeroDivisionError):
        end_of(run, 0, ZeroDivisionError())
    assert run.marker.is_file()


def test_metrics_are_lines_of_json_even_where_numbers_have_no_end(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    run.append_metrics(StepMetrics(1, 2, 0.5, 3.0, 1.0, 1e-4, 100, 50.0, 10**9, 2.0))
    run.append_metrics(ValidationResult(step=1, loss=900.0, perplexity=float("inf"), rows=4))

    def refuse(name: str) -> None:
        raise AssertionError(name)

    step, validated = (json.loads(line, parse_constant=refuse) for line in run.metrics.read_text().splitlines())
    assert (step["event"], step["loss"], step["learning_rate"]) == ("step", 3.0, 1e-4)
    assert validated == {"event": "validation", "step": 1, "loss": 900.0, "perplexity": None, "rows": 4}


def test_the_end_of_a_run_says_whether_it_can_go_on(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")

    def fail_after(checkpoint: int | None) -> dict[str, object]:
        with pytest.raises(DivergedError):
            end_of(run, 7, DivergedError("the loss is not finite"), checkpoint)
        return json.loads(run.outcome.read_text())

    without, with_one = fail_after(None), fail_after(4)
    assert (without["step"], without["resumable"], without["checkpoint"]) == (7, False, None)
    assert (with_one["step"], with_one["resumable"], with_one["checkpoint"]) == (7, True, 4)
    end_of(run, 9, None)
    assert json.loads(run.outcome.read_text())["resumable"] is False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_run_that_is_stopped_by_a_signal_can_go_on_if_it_has_a_checkpoint(tmp_path: Path, number: int):
    run = RunDirectory.create(tmp_path / "run")
    with pytest.raises(Interrupted, match="before anything could be saved") as interrupted, run.attempt():
        raise StopRequested(number)
    assert interrupted.value.exit_code == 128 + number
    assert names_in(tmp_path) == []
    run = RunDirectory.create(tmp_path / "run")
    with pytest.raises(Stopped, match="after step 4, which is saved") as stopped:
        end_of(run, 5, StopRequested(number), checkpoint=4)
    assert str(stopped.value.hint).endswith(f"ft train --resume {run.path}")
    outcome = json.loads(run.outcome.read_text())
    assert (outcome["code"], outcome["resumable"], outcome["step"]) == (75, True, 4)


def started_run(path: Path) -> RunDirectory:
    """A run that was once stopped."""
    run = RunDirectory.create(path)
    run.begin("seed: 1", 0)
    end_of(run, 3, None)
    return run


@pytest.mark.parametrize("error", [RefusedError("another base"), DataError("bad row")])
def test_a_run_that_cannot_go_on_is_not_removed(tmp_path: Path, error: FinetuneError):
    run = started_run(tmp_path / "run")
    before = run.outcome.read_text()
    with pytest.raises(type(error)), run.attempt():
        raise error
    assert run.outcome.read_text() == before
    assert run.recipe.read_text() == "seed: 1"


# Going on with a run


def test_what_was_written_past_the_checkpoint_is_set_aside(tmp_path: Path):
    run = started_run(tmp_path / "run")
    run.provenance.write_text("{}")
    run.metrics.write_text("1\n2\n3\n")
    run.begin("seed: 1", metrics_bytes=4)
    assert (run.metrics.read_text(), (run.path / "metrics.attempt-1.jsonl").read_text()) == ("1\n2\n", "3\n")
    assert (run.path / "provenance.attempt-1.json").is_file()
    assert not run.outcome.exists()
    run.metrics.write_text("1\n2\n4\n")
    run.begin("seed: 1", metrics_bytes=0)
    assert (run.metrics.read_text(), (run.path / "metrics.attempt-2.jsonl").read_text()) == ("", "1\n2\n4\n")


def test_nothing_is_set_aside_where_nothing_follows(tmp_path: Path):
    run = started_run(tmp_path / "run")
    run.append_metrics(ValidationResult(step=0, loss=1.0, perplexity=2.7, rows=4))
    before = names_in(run.path)
    run.begin("seed: 1", run.sync_metrics())
    assert names_in(run.path) == sorted({*before} - {"exit.json"})


def test_metrics_wait_for_room_on_the_disk_and_are_written_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = RunDirectory.create(tmp_path / "run")
    steps = [StepMetrics(step, 9, 0.5, 3.0, 1.0, 1e-4, 100, 50.0, 10**9, 2.0) for step in range(1, 6)]
    run.append_metrics(steps[0])
    line_bytes = run.metrics.stat().st_size
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (line_bytes + line_bytes // 2, unlimited[1]))
    try:
        for step in steps[1:3]:
            run.append_metrics(step)
            assert run.metrics.stat().st_size == line_bytes  # and not a half line more
        with pytest.raises(EnvironmentFault):
            run.sync_metrics()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    for step in steps[3:]:
        run.append_metrics(step)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2, 3, 4, 5]
    assert len([record for record in caplog.records if "kept in memory" in record.getMessage()]) == 1


def test_metrics_that_were_lost_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = started_run(tmp_path / "run")
    run.metrics.write_text("1\n")
    run.begin("seed: 1", metrics_bytes=10)
    assert "8 bytes are lost" in caplog.text


def test_what_a_killed_process_was_about_to_write_is_removed_and_nothing_else_hidden(tmp_path: Path):
    run = started_run(tmp_path / "run")
    for name in (".adapter-0123abcd", ".adapter-0123abcd-old"):
        (run.path / name).mkdir()
    (run.path / ".exit.json.4711").touch()
    (run.path / ".gitignore").touch()
    (run.path / ".nfs00000001").touch()
    run.begin("seed: 1", 0)
    assert [name for name in names_in(run.path) if name.startswith(".")] == [".gitignore", ".nfs00000001"]


# One writer


def test_a_second_process_is_refused_and_told_who_trains_the_run(tmp_path: Path):
    run = started_run(tmp_path / "run")
    with run.attempt(), pytest.raises(RefusedError, match=rf"process {os.getpid()} on .*, since \d") as caught:
        end_of(RunDirectory.open(run.path), 1, None)
    assert caught.value.where == str(run.path)
    end_of(run, 4, None)


def test_a_run_that_is_being_trained_is_not_replaced(tmp_path: Path):
    run = started_run(tmp_path / "run")
    with run.attempt(), pytest.raises(RefusedError, match="is being trained"):
        RunDirectory.create(run.path, overwrite=True)
    assert run.recipe.is_file()


def test_who_only_looks_whether_a_run_is_trained_keeps_nobody_from_training_it(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    run.lock.touch()
    with run.lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        Timer(0.02, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        with run.attempt():
            assert run.is_locked


def test_what_stands_in_the_lock_decides_nothing(tmp_path: Path):
    run = started_run(tmp_path / "run")
    run.lock.write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "long ago"}))
    end_of(run, 4, None)
    with run.attempt():
        run.lock.write_text("[]")
        with pytest.raises(RefusedError, match="trained by another process"):
            end_of(RunDirectory.open(run.path), 1, None)


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path):
    run = started_run(tmp_path / "run")
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with run.attempt():
            os.write(writing, b"held")
            signal.pause()
    os.read(reading, 4)
    with pytest.raises(RefusedError, match=f"process {child} on"):
        end_of(run, 1, None)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    end_of(run, 4, None)


def test_a_program_that_is_started_meanwhile_does_not_keep_the_lock(tmp_path: Path):
    run = started_run(tmp_path / "run")
    with run.attempt():
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        end_of(run, 4, None)
    finally:
        child.kill()
        child.wait()


def test_a_run_that_was_removed_while_one_waited_for_it_is_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = started_run(tmp_path / "run")
    lock = module.fcntl.flock
    monkeypatch.setattr(module.fcntl, "flock", lambda *arguments: (shutil.rmtree(run.path), lock(*arguments)))
    with pytest.raises(RefusedError, match="just been removed"):
        end_of(run, 1, None)


def test_where_files_cannot_be_locked_a_warning_stands_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    run = started_run(tmp_path / "run")
    monkeypatch.setattr(module.fcntl, "flock", refuse)
    end_of(run, 4, None)
    assert "cannot be locked (No locks available)" in caplog.text


# Writing


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """What a full disk is like: no file grows beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path):
    file = tmp_path / "value.json"
    write_json(file, {"a": "ü"})
    assert file.read_text(encoding="utf-8") == '{\n  "a": "ü"\n}\n'
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    with largest_file(1000), pytest.raises(EnvironmentFault, match="too large"):
        write_json(file, "x" * 5000)
    assert json.loads(file.read_text()) == {"a": "ü"}
    assert names_in(tmp_path) == ["value.json"]


def test_a_reader_with_the_old_json_open_never_sees_the_new_one(tmp_path: Path):
    file = tmp_path / "value.json"
    write_json(file, ["old"])
    with file.open() as reader:
        write_json(file, ["new"])
        assert json.load(reader) == ["old"]
    assert json.loads(file.read_text()) == ["new"]


def old_target(folder: Path) -> Path:
    target = folder / "adapter"
    target.mkdir()
    (target / "old.txt").write_text("old")
    return target


def test_a_folder_written_aside_appears_whole_when_the_block_ends(tmp_path: Path):
    target = tmp_path / "deep" / "adapter"
    with written_aside(target) as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "new.txt").write_text("new")
        assert not target.exists()
    assert (target / "sub" / "new.txt").read_text() == "new"
    assert names_in(target.parent) == ["adapter"]


def test_a_folder_written_aside_replaces_an_older_one(tmp_path: Path):
    target = old_target(tmp_path)
    with written_aside(target) as aside:
        (aside / "new.txt").write_text("new")
        assert names_in(target) == ["old.txt"]
    assert names_in(target) == ["new.txt"]
    assert names_in(tmp_path) == ["adapter"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError(), DataError("bad row")])
def test_a_block_that_fails_leaves_the_older_folder_and_nothing_else(tmp_path: Path, error: BaseException):
    target = old_target(tmp_path)

    def write() -> None:
        with written_aside(target) as aside:
            (aside / "new.txt").write_text("new")
            raise error

    with pytest.raises(type(error)):
        write()
    assert names_in(tmp_path) == ["adapter"]
    assert names_in(target) == ["old.txt"]


def write_text(folder: Path) -> None:
    (folder / "new.txt").write_text("x" * 100_000)


def write_tensors(folder: Path) -> None:
    save_file({"weight": torch.zeros(100_000)}, folder / "new.safetensors")


@pytest.mark.parametrize("write", [write_text, write_tensors])
def test_a_full_disk_is_a_fault_of_the_machine_and_leaves_the_older_folder(tmp_path: Path, write):
    target = old_target(tmp_path)
    with (
        largest_file(50_000),
        pytest.raises(EnvironmentFault, match=r"cannot be written: .*arge") as caught,
        written_aside(target) as aside,
    ):
        write(aside)
    assert caught.value.where == str(target)
    assert names_in(tmp_path) == ["adapter"]
    assert names_in(target) == ["old.txt"]


def test_a_place_that_cannot_be_written_is_a_fault_of_the_machine(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match="cannot be written"), written_aside(tmp_path / "file" / "adapter"):
        pass


def test_a_file_or_link_in_the_place_of_the_folder_is_left_alone(tmp_path: Path):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to(old_target(tmp_path))
    for name in ("file", "link"):
        with pytest.raises(FinetuneError), written_aside(tmp_path / name):
            pass
    assert names_in(tmp_path) == ["adapter", "file", "link"]
    assert (tmp_path / "link" / "old.txt").read_text() == "old"


@pytest.mark.usefixtures("umask")
def test_folder_and_files_have_the_permissions_that_the_umask_allows(tmp_path: Path):
    with written_aside(tmp_path / "adapter") as aside:
        (aside / "sub").mkdir()
        private = aside / "sub" / "weights.safetensors"
        save_file({"weight": torch.zeros(2)}, private)
        private.chmod(0o600)  # as safetensors does
    folder = tmp_path / "adapter"
    assert (folder / "sub" / "weights.safetensors").stat().st_mode & 0o777 == 0o640
    assert folder.stat().st_mode & 0o777 == 0o750


def test_the_tensors_of_a_folder_written_aside_can_be_read_by_others(tmp_path: Path):
    with written_aside(tmp_path / "adapter") as aside:
        save_file({"weight": torch.zeros(2)}, aside / "weights.safetensors")
        (aside / "config.json").write_text("{}")
    modes = {file.stat().st_mode for file in (tmp_path / "adapter").iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode}

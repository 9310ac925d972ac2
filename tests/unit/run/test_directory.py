"""Run directories: claiming, outcomes, metrics, resume, and atomic files."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

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
from finetune.run.directory import RunDirectory
from finetune.run.events import StepMetrics, ValidationResult
from finetune.run.lock import locked
from finetune.run.signals import StopRequested


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Claiming


def test_create_makes_marker_and_parent_folders(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "a" / "b" / "run")
    assert json.loads(run.marker.read_text())["format"] == 1
    assert RunDirectory.open(run.path).path == run.path


def test_create_accepts_empty_folder(tmp_path: Path):
    (tmp_path / "run").mkdir()
    assert RunDirectory.create(tmp_path / "run").marker.is_file()


def test_create_refuses_existing_run_without_overwrite(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    run.log.write_text("old")
    with pytest.raises(RefusedError, match="a run is there already") as caught:
        RunDirectory.create(run.path)
    assert "--overwrite" in str(caught.value.hint)
    assert run.log.read_text() == "old"
    with pytest.raises(RefusedError, match="being trained"):
        RunDirectory.create(run.path, overwrite=True)  # its creator is about to train it
    del run
    new = RunDirectory.create(tmp_path / "run", overwrite=True)
    assert names_in(new.path) == ["lock", "run.json"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_create_never_removes_folder_that_is_not_a_run(tmp_path: Path, overwrite: bool):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(RefusedError, match="not a run") as caught:
        RunDirectory.create(tmp_path / "thesis", overwrite)
    assert "--overwrite" not in str(caught.value.hint)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
def test_create_never_removes_file(tmp_path: Path, overwrite: bool):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RefusedError):
        RunDirectory.create(tmp_path / "run", overwrite)
    assert (tmp_path / "run").read_text() == "a file"


@pytest.mark.parametrize("target", ["run", "empty", "nowhere"])
def test_create_refuses_symbolic_link_and_keeps_its_target(tmp_path: Path, target: str):
    RunDirectory.create(tmp_path / "run").log.write_text("old")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(RefusedError, match="symbolic link"):
        RunDirectory.create(tmp_path / "link", overwrite=True)
    assert (tmp_path / "run" / "log.txt").read_text() == "old"
    assert names_in(tmp_path) == ["empty", "link", "run"]


def test_create_by_two_processes_at_once_refuses_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    RunDirectory.create(tmp_path / "run")
    monkeypatch.setattr(RunDirectory, "_refuse_if_used", lambda run: None)  # as if checked earlier
    with pytest.raises(RefusedError, match="another process"):
        RunDirectory.create(tmp_path / "run")


@pytest.mark.parametrize("overwrite", [False, True])
def test_create_in_unwritable_folder_raises_environment_fault(tmp_path: Path, overwrite: bool):
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match="cannot be written") as caught:
        RunDirectory.create(tmp_path / "file" / "run", overwrite)
    assert "--run-dir" in str(caught.value.hint)


def test_open_without_run_names_runs_in_the_same_folder(tmp_path: Path):
    with pytest.raises(UsageError, match="not a run directory") as caught:
        RunDirectory.open(tmp_path / "third")
    assert "ft train" in str(caught.value.hint)
    RunDirectory.create(tmp_path / "first")
    RunDirectory.create(tmp_path / "second")
    with pytest.raises(UsageError) as caught:
        RunDirectory.open(tmp_path / "third")
    assert str(caught.value.hint).endswith(": first, second")


def test_free_path_adds_number_if_taken(tmp_path: Path):
    wanted = tmp_path / "run"
    found = []
    for _ in range(3):
        path = RunDirectory.free_path(wanted)
        found.append(path.name)
        RunDirectory.create(path)
    assert found == ["run", "run-2", "run-3"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert RunDirectory.free_path(tmp_path / "link").name == "link-2"


# Outcome of a run


def end_of(run: RunDirectory, steps: int, error: BaseException | None, checkpoint: int | None = None) -> None:
    with run.attempt() as attempt:
        attempt.steps, attempt.checkpoint = steps, checkpoint
        if error is not None:
            raise error


@pytest.mark.parametrize("error", [DataError("bad row"), KeyboardInterrupt()])
def test_attempt_failing_before_first_step_removes_run(tmp_path: Path, error: BaseException):
    run = RunDirectory.create(tmp_path / "run")
    run.log.write_text("reading the data")
    with pytest.raises(type(error)):
        end_of(run, steps=0, error=error)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DivergedError("the loss is not finite", where="step 8"), 5, "the loss is not finite"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (None, 0, "done"),
    ],
)
def test_attempt_with_steps_records_outcome(tmp_path: Path, error: BaseException | None, code: int, message: str):
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


def test_attempt_ended_by_bug_keeps_directory(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    with pytest.raises(ZeroDivisionError):
        end_of(run, 0, ZeroDivisionError())
    assert run.marker.is_file()


def test_bug_before_the_first_step_does_not_block_the_next_try(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    with pytest.raises(ZeroDivisionError):
        end_of(run, 0, ZeroDivisionError())
    run.log.write_text("old")
    assert names_in(RunDirectory.create(run.path).path) == ["lock", "run.json"]


@pytest.mark.parametrize("what", ["steps", "checkpoint", "metrics", "success", "locked"])
def test_failed_run_with_results_still_blocks_its_name(tmp_path: Path, what: str):
    run = RunDirectory.create(tmp_path / "run")
    if what == "success":
        end_of(run, 0, None)
    else:
        with pytest.raises(ZeroDivisionError):
            end_of(run, 3 if what == "steps" else 0, ZeroDivisionError())
    if what == "checkpoint":
        (run.checkpoints / "step-00000002").mkdir(parents=True)
    if what == "metrics":
        (run.path / "metrics.attempt-1.jsonl").write_text(json.dumps({"event": "step", "step": 1}) + "\n")
    with locked(run.lock) if what == "locked" else nullcontext(), pytest.raises(RefusedError):
        RunDirectory.create(run.path)
    assert run.outcome.is_file()


@pytest.mark.parametrize("error", [ImportError("libc"), KeyboardInterrupt(), RuntimeError("no home")])
def test_failure_before_the_attempt_removes_a_new_run_only(tmp_path: Path, error: BaseException):
    run = RunDirectory.create(tmp_path / "run")
    with pytest.raises(type(error)), run.removed_unless_attempted():
        raise error
    assert names_in(tmp_path) == []
    old = RunDirectory.create(tmp_path / "old")
    old.recipe.write_text("model: {}")
    with pytest.raises(type(error)), old.removed_unless_attempted():
        raise error
    assert names_in(tmp_path) == ["old"]


def test_metrics_with_infinite_numbers_are_valid_json(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    run.append_metrics(StepMetrics(1, 2, 0.5, 3.0, 1.0, 1e-4, 100, 50.0, 10**9, 2.0))
    run.append_metrics(ValidationResult(step=1, loss=900.0, perplexity=float("inf"), rows=4))

    def refuse(name: str) -> None:
        raise AssertionError(name)

    step, validated = (json.loads(line, parse_constant=refuse) for line in run.metrics.read_text().splitlines())
    assert (step["event"], step["loss"], step["learning_rate"]) == ("step", 3.0, 1e-4)
    assert validated == {"event": "validation", "step": 1, "loss": 900.0, "perplexity": None, "rows": 4}


def test_outcome_records_whether_run_is_resumable(tmp_path: Path):
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
def test_stop_request_is_resumable_only_with_checkpoint(tmp_path: Path, number: int):
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
    """A run with an earlier attempt."""
    run = RunDirectory.create(path)
    run.begin("seed: 1", 0)
    end_of(run, 3, None)
    return run


@pytest.mark.parametrize("error", [RefusedError("another base"), DataError("bad row")])
def test_failed_resume_keeps_run_and_outcome(tmp_path: Path, error: FinetuneError):
    run = started_run(tmp_path / "run")
    before = run.outcome.read_text()
    with pytest.raises(type(error)), run.attempt():
        raise error
    assert run.outcome.read_text() == before
    assert run.recipe.read_text() == "seed: 1"


# Resuming a run


def test_begin_moves_metrics_past_checkpoint_to_attempt_file(tmp_path: Path):
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


def test_begin_without_later_metrics_makes_no_attempt_file(tmp_path: Path):
    run = started_run(tmp_path / "run")
    run.append_metrics(ValidationResult(step=0, loss=1.0, perplexity=2.7, rows=4))
    before = names_in(run.path)
    run.begin("seed: 1", run.sync_metrics())
    assert names_in(run.path) == sorted({*before} - {"exit.json"})


def test_metrics_on_full_disk_are_kept_and_written_later(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = RunDirectory.create(tmp_path / "run")
    steps = [StepMetrics(step, 9, 0.5, 3.0, 1.0, 1e-4, 100, 50.0, 10**9, 2.0) for step in range(1, 6)]
    run.append_metrics(steps[0])
    line_bytes = run.metrics.stat().st_size
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (line_bytes + line_bytes // 2, unlimited[1]))
    try:
        for step in steps[1:3]:
            run.append_metrics(step)
            assert run.metrics.stat().st_size == line_bytes  # no partial line
        with pytest.raises(EnvironmentFault):
            run.sync_metrics()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    for step in steps[3:]:
        run.append_metrics(step)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2, 3, 4, 5]
    assert len([record for record in caplog.records if "kept in memory" in record.getMessage()]) == 1


def test_begin_warns_about_lost_metrics(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = started_run(tmp_path / "run")
    run.metrics.write_text("1\n")
    run.begin("seed: 1", metrics_bytes=10)
    assert "8 bytes are lost" in caplog.text


def test_begin_removes_temporary_files_and_keeps_other_hidden_files(tmp_path: Path):
    run = started_run(tmp_path / "run")
    for name in (".adapter-0123abcd", ".adapter-0123abcd-old"):
        (run.path / name).mkdir()
    (run.path / ".exit.json.4711").touch()
    (run.path / ".gitignore").touch()
    (run.path / ".nfs00000001").touch()
    run.begin("seed: 1", 0)
    assert [name for name in names_in(run.path) if name.startswith(".")] == [".gitignore", ".nfs00000001"]


CLAIM = """
import sys
from pathlib import Path
from finetune.errors import FinetuneError
from finetune.run.directory import RunDirectory

sys.stdin.read(1)  # all begin at the same moment
try:
    run = RunDirectory.create(Path(sys.argv[1]), overwrite=sys.argv[2] == "overwrite")
    with run.attempt():
        run.begin("recipe", 0)
        (run.path / sys.argv[3]).touch()
        sys.stdout.write("claimed\\n")
        sys.stdout.flush()
        sys.stdin.read()
except FinetuneError as error:
    sys.exit(error.exit_code)
"""


def test_processes_that_claim_one_directory_are_all_refused_but_one(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    for number in range(3):
        target = tmp_path / f"run-{number}"
        commands = [
            [sys.executable, "-c", CLAIM, str(target), "overwrite" if index % 2 else "new", f"file-{index}"]
            for index in range(4)
        ]
        processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            for command in commands
        ]
        for process in processes:
            process.stdin.write(b"x")
            process.stdin.flush()
        refused = []
        for _ in range(3):  # the one that claims the directory waits for the end of its input
            while not (ended := [each for each in processes if each.poll() is not None and each not in refused]):
                time.sleep(0.01)
            refused.append(ended[0])
        (winner,) = (each for each in processes if each not in refused)
        index = processes.index(winner)
        assert [each.returncode for each in refused] == [RefusedError.exit_code] * 3
        winner.stdin.close()
        assert winner.wait(60) == 0
        assert (target / f"file-{index}").is_file()
        assert not any((target / f"file-{other}").exists() for other in range(4) if other != index)


@pytest.mark.parametrize("name", ["lock", "log.txt", "metrics.jsonl", "checkpoints", "exit.json"])
def test_run_with_a_symbolic_link_is_not_resumed_and_its_target_is_unchanged(tmp_path: Path, name: str):
    run = RunDirectory.create(tmp_path / "run")
    run.begin("seed: 1", 0)
    end_of(run, 3, None)
    target = tmp_path / "precious"
    target.mkdir() if name == "checkpoints" else target.write_text("precious")
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(target)
    resumed = RunDirectory.open(run.path)
    with pytest.raises(RefusedError, match="symbolic link") as refused, resumed.attempt():
        resumed.begin("seed: 1", 0)
    assert refused.value.where == str(run.path / name)
    assert list(target.iterdir()) == [] if name == "checkpoints" else target.read_text() == "precious"

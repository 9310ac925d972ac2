"""Trackers receive the metrics of a run; none of their faults affects the run or reveals a secret."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import UnsupportedError
from finetune.recipe.recipe import Recipe
from finetune.recipe.secrets import redacted
from finetune.run.directory import RunDirectory
from finetune.run.events import Event, Phase, StepMetrics, ValidationResult
from finetune.run.trackers import process
from finetune.run.trackers.process import refuse_missing_packages, tracked
from tests.fixtures.trackers import Fakes

NAMES = ["tensorboard", "wandb", "mlflow", "trackio"]


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(tmp_path, monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run")


def recipe(*trackers: dict[str, Any]) -> Recipe:
    data = {"train": [{"path": "rows.jsonl", "format": "chat"}]}
    sections = {"model": {"name": "m"}, "adapter": {"method": "lora"}, "data": data, "run": {"name": "mine"}}
    return Recipe.model_validate({**sections, "trackers": list(trackers)})


def step(number: int) -> StepMetrics:
    return StepMetrics(number, 3, 0.5, 2.0, float("inf"), 1e-4, 100, 50.0, 10**9, 2.0)


def follow(run: RunDirectory, asked: Recipe, steps: int = 3) -> list[Event]:
    """Send some steps and a validation loss to the trackers; returns the events that the run's own handler got."""
    events_seen: list[Event] = []
    with tracked(asked, run, events_seen.append) as report:
        report(Phase("training"))
        for number in range(1, steps + 1):
            report(step(number))
        report(ValidationResult(step=steps, loss=1.5, perplexity=4.5, rows=4))
    return events_seen


def recorded_processes(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The tracker processes that are started from now on."""
    started: list[subprocess.Popen[bytes]] = []
    start = process._start
    monkeypatch.setattr(process, "_start", lambda setup: started.append(start(setup)) or started[-1])
    return started


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("name", NAMES)
def test_tracker_receives_recipe_steps_and_end(
    name: str, fakes: Fakes, run: RunDirectory, caplog: pytest.LogCaptureFixture
):
    events_seen = follow(run, recipe({"name": name}))
    assert [type(event) for event in events_seen] == [Phase, *[StepMetrics] * 3, ValidationResult, Phase]
    values: dict[int, dict[str, float]] = {}
    for numbers, at, *named in fakes.calls("log"):
        values.setdefault(at if not isinstance(at, dict) else at["step"], {}).update(numbers)
        assert named in ([], [{}])
    assert list(values) == [1, 2, 3]
    assert values[2]["train/loss"] == 2.0
    assert "train/gradient_norm" not in values[2]  # infinite: trackers accept finite numbers only
    assert values[3]["validation/loss"] == 1.5
    (finish,) = fakes.calls("finish")
    assert finish[:-1] == {"wandb": [0], "mlflow": ["FINISHED"]}.get(name, [])
    (opening,) = fakes.calls("init")
    if name in ("wandb", "trackio"):
        assert opening[-1]["config"]["adapter"]["method"] == "lora"
    if name == "mlflow":
        assert {"adapter.method": "lora"}.items() <= {
            k: v for p in fakes.calls("params") for k, v in p[0].items()
        }.items()
        assert fakes.calls("uri")[0][0].startswith(f"sqlite:///{run.path}")
    assert not warnings(caplog)


@pytest.mark.parametrize(("section", "mode"), [({}, None), ({"offline": True, "project": "p"}, "offline")])
def test_wandb_gets_no_code_or_arguments_and_may_stay_offline(
    section: dict[str, Any], mode: str | None, fakes: Fakes, run: RunDirectory
):
    follow(run, recipe({"name": "wandb", **section}))
    ((opening,),) = fakes.calls("init")
    assert (opening["mode"], opening["project"]) == (mode, section.get("project"))
    assert opening["settings"].items() >= {"disable_git": True, "disable_code": True, "x_disable_meta": True}.items()
    assert Path(opening["dir"]).is_relative_to(run.path)


def test_mlflow_offline_stays_in_the_run_whatever_the_environment_says(
    fakes: Fakes, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracker.invalid")
    follow(run, recipe({"name": "mlflow"}))
    assert fakes.calls("uri") == []
    follow(run, recipe({"name": "mlflow", "offline": True}))
    assert fakes.calls("uri")[0][0].startswith(f"sqlite:///{run.path}")


def test_tracker_id_is_stable_per_run(fakes: Fakes, run: RunDirectory, tmp_path: Path):
    for each in (run, run, RunDirectory.create(tmp_path / "other")):
        follow(each, recipe({"name": "wandb"}))
    first, again, other = (named["id"] for (named,) in fakes.calls("init"))
    assert first == again != other


def test_tracker_of_failed_run_is_finished_as_failed(fakes: Fakes, run: RunDirectory):
    def report_and_fail(event: Event) -> None:
        if isinstance(event, ValidationResult):
            raise KeyError

    with pytest.raises(KeyError), tracked(recipe({"name": "wandb"}), run, report_and_fail) as report:
        report(ValidationResult(step=1, loss=1.5, perplexity=4.5, rows=4))
    assert [arguments[0] for arguments in fakes.calls("finish")] == [1]


@pytest.mark.parametrize("call", ["init", "log", "finish"])
@pytest.mark.parametrize("how", ["raises", "exits", "crashes", "hangs"])
def test_misbehaving_tracker_causes_one_warning_and_run_continues(
    how: str, call: str, fakes: Fakes, run: RunDirectory, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(process, "FINISH_SECONDS", 3.0)
    monkeypatch.setenv("WANDB_API_KEY", "c0ffee-c0ffee")
    fakes.misbehave(f"{how} in {call}")
    started = recorded_processes(monkeypatch)
    events_seen = follow(run, recipe({"name": "wandb"}))
    assert [each.returncode is not None for each in started] == [True]  # a hanging one was killed
    assert len(events_seen) == 6
    (warning,) = warnings(caplog)
    assert warning.startswith("wandb no longer tracks the run, which continues without it: ")
    reason = {
        "raises": "RuntimeError: refused ... ...",
        "exits": "SystemExit: no account",
        "hangs": "did not finish in time",
    }
    assert reason.get(how, "its process has ended") in warning
    assert "c0ffee" not in caplog.text
    assert "hf_" not in caplog.text


def test_misbehaving_tracker_does_not_disturb_others(fakes: Fakes, run: RunDirectory, caplog: pytest.LogCaptureFixture):
    fakes.misbehave("raises in params")  # a call that only mlflow gets
    follow(run, recipe({"name": "mlflow"}, {"name": "wandb"}))
    assert len(warnings(caplog)) == 1
    assert [at for _, at, _ in fakes.calls("log")] == [1, 2, 3, 3]
    assert len(fakes.calls("finish")) == 1


def test_output_of_tracker_package_is_discarded(
    fakes: Fakes, run: RunDirectory, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    fakes.misbehave("prints in log")
    follow(run, recipe({"name": "wandb"}))
    assert "noise" not in "".join(capfd.readouterr()) + caplog.text
    assert len(fakes.calls("finish")) == 1


def test_stopped_tracker_process_never_blocks_the_run(
    fakes: Fakes, run: RunDirectory, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """A blocking write into the full pipe of a stopped process would never return."""
    started, handled = recorded_processes(monkeypatch), []
    with tracked(recipe({"name": "wandb"}), run, handled.append) as report:
        assert not os.get_blocking(started[0].stdin.fileno())
        os.kill(started[0].pid, signal.SIGSTOP)
        for number in range(20_000):  # 5 MB: more than the pipe holds
            report(step(number))
    assert sum(isinstance(event, StepMetrics) for event in handled) == 20_000
    assert "does not keep up" in warnings(caplog)[0]
    assert started[0].returncode == -signal.SIGKILL


def test_missing_tracker_package_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process, "find_spec", lambda name: None if name == "mlflow" else name)
    with pytest.raises(UnsupportedError, match="the package mlflow is not installed") as caught:
        refuse_missing_packages(recipe({"name": "wandb"}, {"name": "mlflow"}).trackers)
    assert (caught.value.where, caught.value.exit_code) == ("trackers.1.name", 2)
    assert "pip install mlflow" in str(caught.value.hint)


def test_secrets_of_the_environment_are_redacted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse")
    monkeypatch.setenv("SHORT_TOKEN", "a")
    text = "at https://me:pw@host with correct horse and hf_" + "a" * 34
    assert redacted(text) == "at ...host with ... and ..."


def test_tensorboard_reads_written_events(run: RunDirectory, caplog: pytest.LogCaptureFixture):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follow(run, recipe({"name": "tensorboard"}))
    assert not warnings(caplog)
    events = EventAccumulator(str(run.trackers / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    assert [event.step for event in events.Tensors("train/loss")] == [1, 2, 3]
    assert events.Tensors("validation/loss")[0].tensor_proto.float_val[0] == 1.5

"""Trackers are told what a run reports, and nothing that they do can touch the run or give away a secret."""

from __future__ import annotations

import os
import signal
import time
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
    """Report some steps and a held-out loss to the trackers; returns what was reported on."""
    recording_errors: list[Event] = []
    with tracked(asked, run, recording_errors.append) as report:
        report(Phase("training"))
        for number in range(1, steps + 1):
            report(step(number))
        report(ValidationResult(step=steps, loss=1.5, perplexity=4.5, rows=4))
    return recording_errors


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_is_told_every_step_the_recipe_and_the_end(
    name: str, fakes: Fakes, run: RunDirectory, caplog: pytest.LogCaptureFixture
):
    recording_errors = follow(run, recipe({"name": name}))
    assert [type(event) for event in recording_errors] == [Phase, *[StepMetrics] * 3, ValidationResult, Phase]
    values: dict[int, dict[str, float]] = {}
    for numbers, at, *named in fakes.told("log"):
        values.setdefault(at if not isinstance(at, dict) else at["step"], {}).update(numbers)
        assert named in ([], [{}])
    assert list(values) == [1, 2, 3]
    assert values[2]["train/loss"] == 2.0
    assert "train/gradient_norm" not in values[2]  # it is infinite, which no tracker takes
    assert values[3]["validation/loss"] == 1.5
    (finish,) = fakes.told("finish")
    assert finish[:-1] == {"wandb": [0], "mlflow": ["FINISHED"]}.get(name, [])
    (opening,) = fakes.told("init")
    if name in ("wandb", "trackio"):
        assert opening[-1]["config"]["adapter"]["method"] == "lora"
    if name == "mlflow":
        assert {"adapter.method": "lora"}.items() <= {
            k: v for p in fakes.told("params") for k, v in p[0].items()
        }.items()
        assert fakes.told("uri")[0][0].startswith(f"sqlite:///{run.path}")
    assert not warnings(caplog)


@pytest.mark.parametrize(("section", "mode"), [({}, None), ({"offline": True, "project": "p"}, "offline")])
def test_wandb_is_sent_neither_code_nor_arguments_and_may_stay_offline(
    section: dict[str, Any], mode: str | None, fakes: Fakes, run: RunDirectory
):
    follow(run, recipe({"name": "wandb", **section}))
    ((opening,),) = fakes.told("init")
    assert (opening["mode"], opening["project"]) == (mode, section.get("project"))
    assert opening["settings"].items() >= {"disable_git": True, "disable_code": True, "x_disable_meta": True}.items()
    assert Path(opening["dir"]).is_relative_to(run.path)


def test_mlflow_offline_stays_in_the_run_whatever_the_environment_says(
    fakes: Fakes, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracker.invalid")
    follow(run, recipe({"name": "mlflow"}))
    assert fakes.told("uri") == []
    follow(run, recipe({"name": "mlflow", "offline": True}))
    assert fakes.told("uri")[0][0].startswith(f"sqlite:///{run.path}")


def test_a_run_keeps_its_id_and_another_has_another(fakes: Fakes, run: RunDirectory, tmp_path: Path):
    for each in (run, run, RunDirectory.create(tmp_path / "other")):
        follow(each, recipe({"name": "wandb"}))
    first, again, other = (named["id"] for (named,) in fakes.told("init"))
    assert first == again != other


def test_a_run_that_did_not_end_well_is_said_to_have_failed(fakes: Fakes, run: RunDirectory):
    def report_and_fail(event: Event) -> None:
        if isinstance(event, ValidationResult):
            raise KeyError

    with pytest.raises(KeyError), tracked(recipe({"name": "wandb"}), run, report_and_fail) as report:
        report(ValidationResult(step=1, loss=1.5, perplexity=4.5, rows=4))
    assert [arguments[0] for arguments in fakes.told("finish")] == [1]


@pytest.mark.parametrize("call", ["init", "log", "finish"])
@pytest.mark.parametrize("how", ["raises", "exits", "crashes", "hangs"])
def test_whatever_a_tracker_does_the_run_goes_on_and_is_warned_once(
    how: str, call: str, fakes: Fakes, run: RunDirectory, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(process, "FINISH_SECONDS", 3.0)
    monkeypatch.setenv("WANDB_API_KEY", "c0ffee-c0ffee")
    fakes.misbehave(f"{how} in {call}")
    began = time.monotonic()
    recording_errors = follow(run, recipe({"name": "wandb"}))
    assert time.monotonic() - began < 10
    assert len(recording_errors) == 6
    (warning,) = warnings(caplog)
    assert warning.startswith("wandb no longer follows the run, which goes on without it: ")
    reason = {"raises": "RuntimeError: refused ... ...", "exits": "SystemExit: no account", "hangs": "not done in time"}
    assert reason.get(how, "its process has ended") in warning
    assert "c0ffee" not in caplog.text
    assert "hf_" not in caplog.text


def test_one_that_misbehaves_does_not_disturb_another(
    fakes: Fakes, run: RunDirectory, caplog: pytest.LogCaptureFixture
):
    fakes.misbehave("raises in params")  # which mlflow alone is told
    follow(run, recipe({"name": "mlflow"}, {"name": "wandb"}))
    assert len(warnings(caplog)) == 1
    assert [at for _, at, _ in fakes.told("log")] == [1, 2, 3, 3]
    assert len(fakes.told("finish")) == 1


def test_what_a_package_prints_goes_nowhere(
    fakes: Fakes, run: RunDirectory, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    fakes.misbehave("prints in log")
    follow(run, recipe({"name": "wandb"}))
    assert "noise" not in "".join(capfd.readouterr()) + caplog.text
    assert len(fakes.told("finish")) == 1


def test_a_process_that_takes_nothing_in_is_never_waited_for(
    fakes: Fakes, run: RunDirectory, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    started = []
    start = process._start
    monkeypatch.setattr(process, "_start", lambda opening: started.append(start(opening)) or started[-1])
    with tracked(recipe({"name": "wandb"}), run, lambda event: None) as report:
        os.kill(started[0].pid, signal.SIGSTOP)
        slowest = 0.0
        for number in range(20_000):
            began = time.perf_counter()
            report(step(number))
            slowest = max(slowest, time.perf_counter() - began)
    assert slowest < 1
    assert "does not keep up" in warnings(caplog)[0]
    assert started[0].returncode == -signal.SIGKILL


def test_a_package_that_is_not_installed_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch):
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


def test_tensorboard_itself_reads_what_was_written(run: RunDirectory, caplog: pytest.LogCaptureFixture):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follow(run, recipe({"name": "tensorboard"}))
    assert not warnings(caplog)
    events = EventAccumulator(str(run.trackers / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    assert [event.step for event in events.Tensors("train/loss")] == [1, 2, 3]
    assert events.Tensors("validation/loss")[0].tensor_proto.float_val[0] == 1.5

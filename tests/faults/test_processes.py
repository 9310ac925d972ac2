"""Several processes of a run under one launcher: they end together, with one error and the right exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from .conftest import ROOT

ENDLESS = ["--set", "training.epochs=5000"]


class Launch:
    """`ft train` with several processes, in a session of its own."""

    def __init__(self, folder: Path, *arguments: object, program: tuple[str, ...] = ("-m", "cli")) -> None:
        self.run = folder / "run"
        self.errors = folder / "errors.txt"
        self.process = subprocess.Popen(
            [sys.executable, *program, "train", *map(str, arguments), "--run-dir", self.run],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.errors.open("w"),
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FT_CACHE": str(folder / "cache")},
            start_new_session=True,
        )

    def ranks(self) -> list[psutil.Process]:
        """Its processes, the main one first."""
        found = [p for p in psutil.Process(self.process.pid).children(recursive=True) if "RANK" in p.environ()]
        return sorted(found, key=lambda process: int(process.environ()["RANK"]))

    def wait_for_step(self, step: int) -> None:
        """Until so many are written down."""
        metrics = self.run / "metrics.jsonl"
        self.wait_until(lambda: metrics.is_file() and metrics.read_text().count('"event": "step"') >= step)

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not is_so():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def said(self) -> str:
        """Standard error."""
        return self.errors.read_text()

    def outcome(self) -> dict[str, object]:
        """What the run directory says of the end."""
        return json.loads((self.run / "exit.json").read_text())


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    """Starts one, and leaves no process behind."""
    launches: list[Launch] = []

    def start(*arguments: object, program: tuple[str, ...] = ("-m", "cli")) -> Launch:
        launches.append(Launch(tmp_path, *arguments, program=program))
        return launches[-1]

    yield start
    for one in launches:
        for process in [psutil.Process(one.process.pid)] if one.process.poll() is None else []:
            for child in [*process.children(recursive=True), process]:
                child.kill()
        one.process.wait()


def all_end(ranks: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(ranks, timeout=10)
    return not alive


def test_killed_process_ends_all_with_one_error(launch: Callable[..., Launch], recipe: Path):
    training = launch(recipe, *ENDLESS, "--processes", 2)
    training.wait_for_step(3)
    ranks = training.ranks()
    assert len(ranks) == 2
    ranks[1].kill()
    assert training.process.wait(60) == 128 + signal.SIGKILL
    assert all_end(ranks)
    assert training.said().count("error:") == 1
    assert "process 1: ended by SIGKILL" in training.said()
    assert "Traceback" not in training.said()
    assert training.outcome()["code"] == 137
    assert training.outcome()["resumable"]
    steps = training.outcome()["checkpoint"]
    command = [
        sys.executable,
        "-m",
        "cli",
        "train",
        "--resume",
        training.run,
        "--set",
        f"training.max_steps={steps + 2}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_processes_restart_after_a_kill_up_to_the_limit(launch: Callable[..., Launch], recipe: Path, tmp_path: Path):
    plain = ["--set", "adapter.dropout=0", "--set", "training.epochs=8", "--processes", 2]
    (tmp_path / "whole").mkdir()
    whole = Launch(tmp_path / "whole", recipe, *plain)
    assert whole.process.wait(120) == 0, whole.said()
    training = launch(recipe, *plain, "--set", "distributed.restarts=1")
    training.wait_for_step(4)
    training.ranks()[0].kill()
    assert training.process.wait(120) == 0, training.said()
    weights, expected = (load_file(one.run / "adapter" / "adapter_model.safetensors") for one in (training, whole))
    assert all(weights[name].equal(expected[name]) for name in expected)
    assert not list(training.run.parent.glob("run-*"))


@pytest.mark.slow
def test_killed_launcher_leaves_no_process(launch: Callable[..., Launch], recipe: Path):
    training = launch(recipe, *ENDLESS, "--processes", 2)
    training.wait_for_step(2)
    ranks = training.ranks()
    training.process.kill()
    assert all_end(ranks)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signal_to_the_launcher_saves_one_checkpoint_with_the_exit_code_of_one_process(
    number: signal.Signals, launch: Callable[..., Launch], recipe: Path
):
    training = launch(recipe, *ENDLESS, "--processes", 2, "--set", "training.checkpoint_every_steps=1000000")
    training.wait_for_step(3)
    ranks = training.ranks()
    training.process.send_signal(number)
    assert training.process.wait(60) == 75
    assert all_end(ranks)
    assert training.said().count("stopped:") == 1
    assert "--processes 2" in training.said()
    assert training.outcome()["resumable"]
    assert len(list((training.run / "checkpoints").iterdir())) == 1


@pytest.mark.slow
def test_signal_before_training_ends_all_and_leaves_no_files(launch: Callable[..., Launch], recipe: Path):
    training = launch(recipe, *ENDLESS, "--processes", 2)
    training.wait_until(lambda: len(training.ranks()) == 2)
    ranks = training.ranks()
    training.process.send_signal(signal.SIGTERM)
    assert training.process.wait(60) == 128 + signal.SIGTERM
    assert all_end(ranks)
    assert not (training.run / "exit.json").exists()


@pytest.mark.slow
def test_second_interrupt_exits_within_a_second(launch: Callable[..., Launch], recipe: Path):
    training = launch(recipe, *ENDLESS, "--processes", 2)
    training.wait_for_step(2)
    ranks = training.ranks()
    for rank in ranks:
        rank.suspend()  # so that none can answer the first
    training.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert training.process.poll() is None  # the control: one is waited for
    training.process.send_signal(signal.SIGINT)
    assert training.process.wait(1) == 130
    assert all_end(ranks)


@pytest.mark.slow
def test_torchrun_run_is_written_by_the_main_process_only(launch: Callable[..., Launch], recipe: Path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cli")
    training = launch(recipe, "--set", "training.epochs=1", program=torchrun)
    assert training.process.wait(120) == 0, training.said()
    assert training.outcome()["code"] == 0
    assert [path.name for path in training.run.parent.glob("run*")] == ["run"]
    assert training.said().count("saving ...") == 1

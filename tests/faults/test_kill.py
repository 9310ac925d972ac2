"""A run that is killed at any moment and started again ends as an uninterrupted one."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from finetune.recipe.load import load_recipe
from finetune.run.sweep_trials import SweepDirectory, Values
from tests.fixtures.recipes import write_recipe

from .conftest import Process, Result, Server

MOMENTS = ("start", "save", "save")
"""What is waited for before each kill of a run, and then a random time more."""


def is_saving(run: Path) -> bool:
    """Whether the process that was killed here was about to commit a checkpoint, or to remove one."""
    return any((run / "checkpoints").glob(".t*"))


def wait_for_save(process: Process, run: Path, since_ns: int) -> None:
    """Wait until a process that was started at a time has begun to save, or has ended with nothing to save."""
    folder = run / "checkpoints"
    while process.is_alive() and not (folder.exists() and folder.stat().st_mtime_ns >= since_ns):
        time.sleep(0.002)


def kill(process: Process) -> bool:
    """Whether it came before the end of the process."""
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    code = process.wait()
    assert code in (0, -signal.SIGKILL)
    return code != 0


def killed_and_finished(server: Server, recipe: Path, run: Path, draw: random.Random) -> list[bool]:
    """Kill a run at random moments of its training, start it again each time, and let it end.

    Returns:
        For each kill that came before the end, whether it hit a save.
    """
    hits = []
    for moment in MOMENTS:
        since_ns = time.time_ns()
        process = server.start("train", recipe, "--resume", "auto", "--run-dir", run, slow_disk=0.01)
        if moment == "save":
            wait_for_save(process, run, since_ns)
        time.sleep(draw.uniform(0, 0.8))
        if kill(process):
            hits.append(is_saving(run))
    assert server.start("train", recipe, "--resume", "auto", "--run-dir", run).wait() == 0
    return hits


@pytest.mark.parametrize("runs", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_run_killed_at_random_moments_ends_as_uninterrupted(
    runs: int, server: Server, recipe: Path, uninterrupted: Result, tmp_path: Path
):
    hits = []
    for number in range(runs):
        run = tmp_path / str(number)
        hits += killed_and_finished(server, recipe, run, random.Random(number))
        assert Result.of(run) == uninterrupted, f"run {number}"
    print(f"{runs} runs, {len(hits)} kills, {sum(hits)} of them in a save")  # noqa: T201
    assert len(hits) >= runs  # of three each
    if runs >= 50:
        assert sum(hits) >= 0.2 * len(hits), "the kills hit too few saves to show anything"


SHORT = ["--set", "training.epochs=0.5", "--set", "training.checkpoints_kept=1"]
"""Three steps, so that every moment of a run can be tried."""


@pytest.fixture(scope="session")
def short(server: Server, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What those leave."""
    run = tmp_path_factory.mktemp("short") / "run"
    assert server.start("train", recipe, *SHORT, "--run-dir", run).wait() == 0
    return Result.of(run)


def survives_kill_before(number: int, server: Server, recipe: Path, run: Path, short: Result) -> bool:
    """Kill a run before its `number`th change on the disk; False if it has no so many."""
    call = ["train", recipe, *SHORT, "--run-dir", run, "--resume", "auto"]
    code = server.start(*call, kill_before=[number, str(run)]).wait()
    if code == 0:
        return False
    assert code == -signal.SIGKILL
    assert server.start(*call).wait() == 0, f"killed before change {number}"
    assert Result.of(run) == short, f"killed before change {number}"
    return True


@pytest.mark.parametrize("number", random.Random(0).sample(range(1, 60), 4))
def test_run_killed_before_some_disk_changes_ends_as_uninterrupted(
    number: int, server: Server, recipe: Path, short: Result, tmp_path: Path
):
    assert survives_kill_before(number, server, recipe, tmp_path / "run", short)


@pytest.mark.slow
def test_run_killed_before_any_disk_change_ends_as_uninterrupted(
    server: Server, recipe: Path, short: Result, tmp_path: Path
):
    number = 1
    while survives_kill_before(number, server, recipe, tmp_path / str(number), short):
        number += 1
    print(f"{number - 1} moments")  # noqa: T201
    assert number > 50


@pytest.fixture(scope="session")
def sweep_recipe(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid of two trials of three steps each."""
    keys = [{"key": "adapter.r", "draw": "choice", "choices": [2, 4]}]
    sections = {**yaml.safe_load(recipe.read_text()), "sweep": {"trials": 2, "keys": keys}}
    sections["training"] |= {"epochs": 0.5, "checkpoints_kept": 1}
    return write_recipe(sections, tmp_path_factory.mktemp("sweep-recipe"))


def trial_facts(sweep: Path) -> list[tuple[Values, float | None]]:
    """Values and loss of each trial; none has failed, is open, or has left something half-done."""
    section = load_recipe(sweep / "sweep.yaml").recipe.sweep
    assert section is not None
    trials = SweepDirectory(sweep, section).trials()
    assert not [path for path in sweep.rglob("*") if path.name.startswith(".")]
    assert not [trial for trial in trials if trial.open_run or trial.failure]
    return [(trial.values, trial.loss) for trial in trials]


@pytest.fixture(scope="session")
def finished_sweep(
    server: Server, sweep_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[Values, float | None]]:
    """The trials of a sweep that nothing happens to."""
    sweep = tmp_path_factory.mktemp("finished-sweep") / "sweep"
    assert server.start("sweep", sweep_recipe, "--sweep-dir", sweep).wait() == 0
    facts = trial_facts(sweep)
    assert len(facts) == 2
    return facts


@pytest.mark.parametrize("number", [1, 2, *random.Random(1).sample(range(3, 90), 4)])
def test_sweep_killed_before_some_disk_changes_ends_as_uninterrupted(
    number: int, server: Server, sweep_recipe: Path, finished_sweep: list[tuple[Values, float | None]], tmp_path: Path
):
    call = ["sweep", sweep_recipe, "--sweep-dir", tmp_path / "sweep"]
    assert server.start(*call, kill_before=[number, str(tmp_path / "sweep")]).wait() == -signal.SIGKILL
    assert server.start(*call).wait() == 0
    assert trial_facts(tmp_path / "sweep") == finished_sweep

"""Which process of a run this one is, as launchers say it."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.errors import DataError, Interrupted, ProcessLost, Stopped
from finetune.run.distributed import ERROR_FILE, Rank, RankExit, first_host

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STEP = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "4711",
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHERS, *STEP):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is taken away again
        monkeypatch.delenv(name)


def test_alone_it_is_the_main_process():
    assert Rank.here() == Rank(0, 1, 1)
    assert Rank.here().is_main


def test_torchrun_says_it_in_pytorchs_words(monkeypatch: pytest.MonkeyPatch):
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert Rank.here() == Rank(3, 4, 2)
    assert not Rank.here().is_main


def test_a_task_of_a_slurm_step_is_a_process_of_a_run(monkeypatch: pytest.MonkeyPatch):
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert Rank.here() == Rank(5, 8, 4)
    from os import environ

    assert (environ["LOCAL_RANK"], environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("1", "gpu07", "24711")


def test_a_batch_script_of_slurm_is_no_task(monkeypatch: pytest.MonkeyPatch):
    for name, value in (("SLURM_NTASKS", "8"), ("SLURM_PROCID", "0"), ("SLURM_JOB_ID", "4711")):
        monkeypatch.setenv(name, value)
    assert Rank.here().count == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[07-09,12],login", "gpu07"),
        ("a,b", "a"),
        ("n1", "n1"),
        ("rack[1-2]node[3-4]", "rack1node3"),
        ("x-[1,3]", "x-1"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    "error",
    [
        DataError("a bad row", where="rows.jsonl:2", hint="mend it"),
        Stopped("by SIGTERM"),
        Interrupted("by SIGTERM", number=15),
        ProcessLost("gone"),
    ],
)
def test_what_ended_a_process_comes_back_from_its_file(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE, str(file))
    RankExit.of(error).write()
    found = RankExit.read(file)
    assert found == RankExit.of(error).__class__(**{**vars(RankExit.of(error)), "timestamp": found.timestamp})
    again = found.error()
    assert again.exit_code == error.exit_code
    assert (again.what, again.hint) == (error.what, error.hint)
    assert found.is_consequence == isinstance(error, ProcessLost)


def test_a_bug_is_told_with_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "error.json"))
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError as error:
        RankExit.of(error).write()
    told = RankExit.read(tmp_path / "error.json").error()
    assert told.exit_code == 1
    assert told.lines()[0] == "process 0: ZeroDivisionError: by zero"
    assert any("test_processes.py" in line for line in told.lines())


@pytest.mark.parametrize("content", [None, "", "{", "{}", '{"ending": {"rank": 0}}'])
def test_a_process_that_was_killed_left_no_word(content: str | None, tmp_path: Path):
    file = tmp_path / "error.json"
    if content is not None:
        file.write_text(content)
    assert RankExit.read(file) is None

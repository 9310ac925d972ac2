"""Rank of this process from launcher variables, and error files of ranks."""

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
        monkeypatch.setenv(name, "")  # registers the variable, so that teardown removes it
        monkeypatch.delenv(name)


def test_rank_without_launcher_is_main():
    assert Rank.here() == Rank(0, 1, 1)
    assert Rank.here().is_main


def test_rank_reads_torchrun_variables(monkeypatch: pytest.MonkeyPatch):
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert Rank.here() == Rank(3, 4, 2)
    assert not Rank.here().is_main


def test_rank_reads_slurm_step_variables(monkeypatch: pytest.MonkeyPatch):
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert Rank.here() == Rank(5, 8, 4)
    from os import environ

    assert (environ["LOCAL_RANK"], environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("1", "gpu07", "24711")


def test_rank_in_slurm_batch_script_is_single(monkeypatch: pytest.MonkeyPatch):
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
def test_first_host_expands_slurm_node_list(nodes: str, first: str):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    "error",
    [
        DataError("a bad row", where="rows.jsonl:2", hint="fix it"),
        Stopped("by SIGTERM"),
        Interrupted("by SIGTERM", number=15),
        ProcessLost("gone"),
    ],
)
def test_rank_exit_round_trips_errors(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE, str(file))
    RankExit.of(error).write()
    found = RankExit.read(file)
    assert found == RankExit.of(error).__class__(**{**vars(RankExit.of(error)), "timestamp": found.timestamp})
    again = found.error()
    assert again.exit_code == error.exit_code
    assert (again.what, again.hint) == (error.what, error.hint)
    assert found.is_consequence == isinstance(error, ProcessLost)


def test_rank_exit_keeps_traceback_of_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "error.json"))
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError as error:
        RankExit.of(error).write()
    raised = RankExit.read(tmp_path / "error.json").error()
    assert raised.exit_code == 1
    assert raised.lines()[0] == "process 0: ZeroDivisionError: by zero"
    assert any("test_distributed.py" in line for line in raised.lines())


@pytest.mark.parametrize("content", [None, "", "{", "{}", '{"ending": {"rank": 0}}'])
def test_rank_exit_read_of_missing_or_broken_file_is_none(content: str | None, tmp_path: Path):
    file = tmp_path / "error.json"
    if content is not None:
        file.write_text(content)
    assert RankExit.read(file) is None

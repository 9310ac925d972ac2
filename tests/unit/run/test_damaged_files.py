"""Files of a run with parts of other types: pages, lists and comparisons leave these parts out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from finetune.report.comparison_page import comparison_page
from finetune.report.run_metadata import RunMetadata
from finetune.report.run_page import run_page
from finetune.run.comparison import differences
from finetune.run.directory import RunDirectory
from finetune.run.evaluation_results import read_results
from finetune.run.index import summarize
from finetune.run.provenance import read_provenance
from finetune.run.watch import watched
from tests.fixtures.runs import written_run

DEEP = "[" * 100_000
FILES = (
    "exit.json", "provenance.json", "data_report.json", "metrics.jsonl", "eval/results.json", "eval/generations.jsonl",
    "merged/merge.json",
)  # fmt: skip

KINDS: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "deep": lambda path: path.write_text(DEEP),
    "a list": lambda path: path.write_text("[1, 2]\n"),
    "half a character": lambda path: path.write_text('{"ft": "\\ud800", "event": "step"}\n'),
    "empty": Path.touch,
}


def read_all(run: RunDirectory, other: RunDirectory) -> str:
    """All that commands read of a run, as pages."""
    summarize(run)
    list(watched(run))
    for arguments in (
        ["runs", "--directory", run.path.parent],
        ["watch", run.path, "--json"],
        ["diff", run.path, other.path],
    ):
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert result.exit_code == 0, result.exception
    facts = RunMetadata.of(run)
    return run_page(facts) + comparison_page([RunMetadata.of(other), facts], [differences(other, run)])


@pytest.fixture
def runs(tmp_path: Path) -> tuple[RunDirectory, RunDirectory]:
    return written_run(tmp_path / "run"), written_run(tmp_path / "other")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_file_of_another_kind_is_left_out(name: str, kind: str, runs: tuple[RunDirectory, RunDirectory]):
    run, other = runs
    (run.path / name).unlink()
    KINDS[kind](run.path / name)
    assert "org/name" in read_all(run, other)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("provenance.json", {"data": 5}),
        ("provenance.json", {"data": [5, {"file": 5}, {"sha256": None}]}),
        ("provenance.json", {"started": {"trainable_parameters": 5, "total_parameters": 0}}),
        ("provenance.json", {"started": 10**400}),
        ("provenance.json", {"packages": ["torch"], "base": "name", "processes": "2", "device": {}}),
        ("exit.json", {"code": [0], "message": None, "ended": 5}),
        ("data_report.json", {"train": {"sources": {}}, "validation": [None]}),
        (
            "data_report.json",
            {"train": {"sources": [{"source": "rows", "bad": 5, "notes": {"note": 1}, "lengths": []}]}},
        ),
        ("data_report.json", {"packing": {"packs": 5}}),
        ("eval/results.json", {"tasks": {"validation": [5]}}),
        ("eval/results.json", {"tasks": {"validation": {"f1": {"value": "0.5", "low": {}, "against": None}}}}),
        ("eval/results.json", {"against": 5}),
        ("merged/merge.json", {"kl_divergence": 1e999, "bound": ""}),
        ("merged/merge.json", {"base": {"fingerprint": []}, "dtype": 5, "rows": -1}),
    ],
)
def test_part_of_another_type_is_left_out(name: str, changes: dict[str, Any], runs: tuple[RunDirectory, RunDirectory]):
    run, other = runs
    file = run.path / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    assert "org/name" in read_all(run, other)


@pytest.mark.parametrize(
    "line",
    [
        {"event": "step", "step": 9, "loss": [1]},
        {"event": "step", "step": {}, "loss": 1.0},
        {"event": ["step"]},
        {"event": "validation", "step": 10**400, "loss": 1.0, "perplexity": 2.0, "rows": 1},
        {"event": "ranks", "step": 3, "ranks": {"layer": -(10**400)}},
        {"event": "best", "step": 3, "best_step": None, "loss": "low", "stopped_early": 5},
    ],
)
def test_summary_ignores_events_of_another_shape(line: dict[str, Any], runs: tuple[RunDirectory, RunDirectory]):
    run, other = runs
    before = summarize(run)
    with run.metrics.open("a") as file:
        file.write(json.dumps(line) + "\n")
    after = summarize(run)
    assert (after.step, after.loss, after.validation_loss) == (before.step, before.loss, before.validation_loss)
    assert (after.step, after.loss, after.validation_loss) == (3, 1.0, 1.25)
    read_all(run, other)


def test_time_that_is_no_number_is_no_step(runs: tuple[RunDirectory, RunDirectory]):
    run, other = runs
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    steps = [{**line, "seconds": None} if line["event"] == "step" else line for line in lines]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in steps))
    assert summarize(run).step == 0
    read_all(run, other)


def test_loss_that_is_not_finite_is_none_in_the_summary(runs: tuple[RunDirectory, RunDirectory]):
    run, _ = runs
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    run.metrics.write_text("".join(json.dumps({**line, "loss": None}) + "\n" for line in lines if "loss" in line))
    summary = summarize(run)
    assert (summary.step, summary.loss, summary.validation_loss) == (3, None, None)


def test_undamaged_parts_are_read_beside_damaged_ones(runs: tuple[RunDirectory, RunDirectory]):
    run, _ = runs
    provenance = json.loads(run.provenance.read_text())
    run.provenance.write_text(json.dumps({**provenance, "processors": "many", "unknown": [1]}))
    found = read_provenance(run.provenance)
    assert found == {**{key: value for key, value in provenance.items() if key != "processors"}, "unknown": [1]}
    file = run.evaluation / "results.json"
    file.write_text(json.dumps({"tasks": {"held_out": {"loss": {"value": 0.5, "rows": "5"}}, "other": 5}}))
    assert read_results(run) == {"tasks": {"validation": {"loss": {"value": 0.5}}}}

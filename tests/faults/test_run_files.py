"""Run directories whose files are damaged at random places: every command ends in a result or a sentence.

The files of a run come from other people, other versions, and disks that fail. The places and kinds of damage follow
from a seed; `damage.py` has the kinds.
"""

from __future__ import annotations

import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app

from .conftest import Originals
from .damage import copied, damaged

SECONDS = 20
"""Processor time of a command; on a busy machine it takes longer."""

HANGS_AFTER = 120
"""Seconds of a command that waits for something."""

CODES = {0, 2, 3, 5, 6, 7, 75}

FINISHED = (
    "run.json", "exit.json", "provenance.json", "data_report.json", "metrics.jsonl", "lock", "log.txt",
    "recipe.resolved.yaml", "eval/results.json", "eval/generations.jsonl", "merged/merge.json",
    "exported/gguf-f16/export.json", "adapter/ft_adapter.json", "checkpoints/step-00000003/MANIFEST.json",
    "checkpoints/step-00000003/state.json",
)  # fmt: skip
STOPPED = (
    "run.json", "exit.json", "provenance.json", "metrics.jsonl", "lock", "log.txt", "recipe.resolved.yaml",
    "checkpoints/step-00000002/MANIFEST.json", "checkpoints/step-00000002/state.json",
    "checkpoints/step-00000002/recipe.resolved.yaml",
)  # fmt: skip
SWEEP = (
    "trials.jsonl", "sweep.yaml", "trial-001/exit.json", "trial-001/metrics.jsonl", "trial-001/run.json",
    "trial-002/recipe.resolved.yaml", "trial-002/exit.json",
)  # fmt: skip

READING = ("runs", "runs clean", "report", "report both", "watch", "watch json", "diff", "diff json")
"""Commands that only read: they take a few milliseconds."""

WORKING = {
    "finished": ("resume", "extend", "again", "eval", "eval checkpoint", "generate", "generate merged",
                 "generate adapter", "merge", "export", "reproduce", "overwrite", "continue"),
    "stopped": ("resume", "auto", "eval checkpoint", "generate adapter", "overwrite"),
    "sweep": ("sweep",),
}  # fmt: skip
"""Commands that load the model, by what was damaged."""


class TooLongError(Exception):
    """A command was not done in time."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def raise_error(*_: Any) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, raise_error)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def invoke(arguments: list[object]) -> Any:
    with time_limit(HANGS_AFTER):
        return CliRunner().invoke(app, list(map(str, arguments)))


def complaint(arguments: list[object]) -> str | None:
    """What is wrong with how a command ends; None if it ends as it should."""
    began = time.process_time()
    result = invoke(arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return "".join(traceback.format_exception(result.exception)[-4:])
    if (seconds := time.process_time() - began) > SECONDS:
        return f"took {seconds:.0f} s"
    if result.exit_code not in CODES:
        return f"exit code {result.exit_code}: {result.stderr}"
    if "Traceback" in result.stderr + result.stdout:
        return result.stderr
    return None


def command(name: str, run: Path, originals: Originals) -> list[object]:
    """The arguments of a command on a damaged run."""
    out, other = run.parent / "out", originals.finished
    checkpoint = next(iter(sorted(run.glob("checkpoints/*"), reverse=True)), run / "checkpoints" / "step-00000002")
    few = ["--max-new-tokens", 1]
    commands: dict[str, Callable[[], list[object]]] = {
        "runs": lambda: ["runs", "--directory", run.parent],
        "runs clean": lambda: ["runs", "clean", "--directory", run.parent, "--yes"],
        "report": lambda: ["report", run],
        "report both": lambda: ["report", other, run, "--output", out.with_suffix(".html"), "--overwrite"],
        "watch": lambda: ["watch", run],
        "watch json": lambda: ["watch", run, "--json"],
        "diff": lambda: ["diff", run, other],
        "diff json": lambda: ["diff", other, run, "--json"],
        "resume": lambda: ["train", "--resume", run],
        "extend": lambda: ["train", "--resume", run, "--set", "training.max_steps=4", "--quiet"],
        "again": lambda: ["train", originals.recipe, "--run-dir", run, "--quiet"],
        "auto": lambda: ["train", originals.recipe, "--resume", "auto", "--run-dir", run, "--quiet"],
        "overwrite": lambda: ["train", originals.recipe, "--run-dir", run, "--overwrite", "--quiet"],
        "continue": lambda: ["train", originals.recipe, "--set", f"adapter.continue_from={run}", "--run-dir", out,
                             "--set", "training.max_steps=1", "--overwrite", "--quiet"],
        "eval": lambda: ["eval", run, "--limit", 2, "--quiet"],
        "eval checkpoint": lambda: ["eval", checkpoint, "--limit", 2, "--json"],
        "generate": lambda: ["generate", run, "-p", "hello", *few],
        "generate merged": lambda: ["generate", run / "merged", "-p", "hello", *few],
        "generate adapter": lambda: ["generate", run / "adapter", "-p", "hello", *few],
        "merge": lambda: ["merge", run, "--output", out, "--overwrite", "--quiet"],
        "export": lambda: ["export", run, "--format", "adapter", "--output", out, "--overwrite", "--quiet"],
        "reproduce": lambda: ["reproduce", run, "--run-dir", run.parent / "again", "--quiet"],
        "sweep": lambda: ["sweep", originals.sweep_recipe, "--sweep-dir", run, "--quiet", "--set", "sweep.trials=3"],
    }  # fmt: skip
    return commands[name]()


FILES = {"finished": FINISHED, "stopped": STOPPED, "sweep": SWEEP}


def complaints(number: int, originals: Originals, folder: Path, working: int) -> list[str]:
    """Damage a file of a run, and return what is wrong with the commands that meet it.

    Args:
        number: Of the try: it decides about the file, the damage and the commands.
        originals: What is copied.
        folder: For the copy.
        working: How many of the commands that load the model are tried.
    """
    source = random.Random(f"run files {number}")
    what = source.choice([*6 * ["finished"], *3 * ["stopped"], "sweep"])
    file = source.choice([each for each in FILES[what] for _ in range(3 if "json" in each else 1)])
    folder.mkdir()
    run = copied(getattr(originals, what), folder / "run")
    done = damaged(run / file, source)
    # A command may repair or remove what is damaged: those that only read come first.
    names = (*(READING if what != "sweep" else ()), *source.sample(WORKING[what], min(working, len(WORKING[what]))))
    found = []
    for name in names:
        if wrong := complaint(command(name, run, originals)):
            found.append(f"{number}. {what}/{file}: {done}: {name}: {wrong}")
    return found


QUICK = 60
TRIES = 500
PORTION = 20


@pytest.mark.parametrize("first", range(0, QUICK, PORTION))
def test_commands_that_read_damaged_runs_end_in_a_result_or_a_sentence(
    first: int, originals: Originals, tmp_path: Path
):
    numbers = range(first, first + PORTION)
    found = [each for number in numbers for each in complaints(number, originals, tmp_path / str(number), working=0)]
    assert not found, "\n\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1000 + TRIES, PORTION))
def test_all_commands_on_damaged_runs_end_in_a_result_or_a_sentence(first: int, originals: Originals, tmp_path: Path):
    numbers = range(first, first + PORTION)
    found = [each for number in numbers for each in complaints(number, originals, tmp_path / str(number), working=2)]
    assert not found, "\n\n".join(found)


BROKEN: dict[str, Callable[[], Any]] = {
    "a hang": lambda: signal.pause(),
    "a bug": lambda: {}["missing"],
    "an unknown exit code": lambda: sys.exit(1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_complaint_about_a_command_that_fails_is_found(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The control: commands that hang, have a bug or exit with 1 are not passed over."""
    monkeypatch.setattr("tests.faults.test_run_files.HANGS_AFTER", 1)
    monkeypatch.setattr("finetune.run.index.runs_in", lambda folder: BROKEN[name]())
    assert complaint(["runs", "--directory", tmp_path]) is not None
    monkeypatch.undo()
    assert complaint(["runs", "--directory", tmp_path]) is None

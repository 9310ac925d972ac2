"""Training processes that can be killed, and an uninterrupted run to compare with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from cli.main import app
from finetune.errors import Stopped
from finetune.jobs.train.run import train
from finetune.recipe.load import load_recipe
from finetune.run.directory import RunDirectory
from finetune.run.events import CheckpointSaved, Event
from finetune.run.signals import Interruption
from tests.fixtures.recipes import write_recipe

ROOT = Path(__file__).parents[2]


class Process(NamedTuple):
    """A training that was started."""

    pid: int
    server: Server

    def is_alive(self) -> bool:
        """Whether it has not ended yet."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def wait(self) -> int:
        """Its exit code, negative for a signal."""
        return int(self.server.answer())


class Server:
    """Starts trainings, one at a time."""

    def __init__(self, errors: Path) -> None:
        self.errors = errors
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors.open("a"),
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "FT_CACHE": str(errors.parent / "cache")},
        )
        assert self.answer() == "ready"

    def answer(self) -> str:
        """The next line."""
        line = self._process.stdout.readline().strip()
        assert line, self.errors.read_text()[-2000:]
        return line

    def start(self, *arguments: object, **faults: Any) -> Process:
        """Start `ft` with these arguments and faults."""
        request = {"arguments": [str(argument) for argument in arguments], "errors": str(self.errors), **faults}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Process(int(self.answer()), self)

    def stop(self) -> None:
        """End the server; no training is under way."""
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Trains on request."""
    server = Server(tmp_path_factory.mktemp("server") / "errors.txt")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def recipe(tiny_model: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps of LoRA with dropout, saved after every step, measured after every fourth."""
    sections = {
        "model": {"name": str(tiny_model)},
        "adapter": {"method": "lora", "r": 4, "dropout": 0.1},
        "data": {"train": [{"path": str(chat_file), "format": "chat"}], "validation_fraction": 0.25, "max_length": 128},
        "optimizer": {"name": "adamw", "learning_rate": 1e-2},
        "training": {"epochs": 2, "micro_batch_size": 2, "gradient_accumulation_steps": 2, "checkpoint_every_steps": 1},
        "evaluation": {"every_steps": 4, "batch_size": 4},
    }
    return write_recipe(sections, tmp_path_factory.mktemp("recipe"))


class Result(NamedTuple):
    """What a finished run leaves, times and memory left out."""

    weights: bytes
    losses: list[tuple[str, int, float]]

    @classmethod
    def of(cls, run: Path) -> Result:
        """Read it, and make sure that nothing half-done is left beside it."""
        assert json.loads((run / "exit.json").read_text())["code"] == 0
        assert not [path for path in run.rglob("*") if path.name.startswith(".")]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
        return cls(weights, [(line["event"], line["step"], line["loss"]) for line in lines])


@pytest.fixture(scope="session")
def uninterrupted(server: Server, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What the recipe's run leaves when nothing happens to it."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert server.start("train", recipe, "--run-dir", run).wait() == 0
    result = Result.of(run)
    assert [step for event, step, _ in result.losses if event == "step"] == list(range(1, 13))
    return result


class Originals(NamedTuple):
    """Run directories and their recipes, for tests to copy."""

    recipe: Path
    sweep_recipe: Path
    finished: Path
    stopped: Path
    sweep: Path


@pytest.fixture(scope="session")
def originals(tiny_model: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Originals:
    """A finished run with all that commands add to it, a stopped one, and a sweep of two trials."""
    folder = tmp_path_factory.mktemp("originals")
    sections: dict[str, Any] = {
        "model": {"name": str(tiny_model)},
        "adapter": {"method": "lora", "r": 4},
        "data": {"train": [{"path": str(chat_file), "format": "chat"}], "validation_fraction": 0.2, "max_length": 128},
        "optimizer": {"name": "adamw", "learning_rate": 1e-2},
        "training": {"precision": "float32", "max_steps": 3, "micro_batch_size": 2, "checkpoint_every_steps": 1},
        "evaluation": {"every_steps": 1, "batch_size": 4, "generation_rows": 2, "max_new_tokens": 2},
        "run": {"name": "run"},
    }
    recipe = write_recipe(sections, folder)
    keys = [{"key": "optimizer.learning_rate", "draw": "log_uniform", "low": 1e-4, "high": 1e-1}]
    (folder / "sweep").mkdir()
    sweep_recipe = write_recipe({**sections, "sweep": {"keys": keys, "trials": 2}}, folder / "sweep")
    finished, stopped, sweep = folder / "finished", folder / "stopped", folder / "trials"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FT_CACHE", str(folder / "cache"))
        for arguments in (
            ["train", recipe, "--run-dir", finished, "--quiet"],
            ["eval", finished, "--against", "base", "--quiet"],
            ["merge", finished, "--quiet"],
            ["sweep", sweep_recipe, "--sweep-dir", sweep, "--quiet"],
        ):
            result = CliRunner().invoke(app, list(map(str, arguments)))
            assert result.exit_code == 0, result.stderr
        # The report of `ft export` has the keys of that of `ft merge`, and one of its own.
        (finished / "exported" / "gguf-f16").mkdir(parents=True)
        report = (finished / "merged" / "merge.json").read_text()
        (finished / "exported" / "gguf-f16" / "export.json").write_text(report.replace("{", '{"format": "gguf",', 1))
        _train_until_stopped(recipe, stopped)
    return Originals(recipe, sweep_recipe, finished, stopped, sweep)


def _train_until_stopped(recipe: Path, path: Path) -> None:
    run = RunDirectory.create(path)
    run.log.write_text("a line\n")
    interruption = Interruption()

    def stop(event: Event) -> None:
        if isinstance(event, CheckpointSaved) and event.step == 2:
            interruption.number = 15

    with pytest.raises(Stopped):
        train(load_recipe(recipe).recipe, run, stop, interruption)

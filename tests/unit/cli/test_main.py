"""What the user can mend is one message and an exit code; a bug keeps its traceback."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from cli import console
from cli.main import Commands, app
from cli.options import AsJson
from finetune import __version__, errors
from finetune.errors import FinetuneError, Problem, RecipeError

EXIT_CODES = {
    "UsageError": 2,
    "RecipeError": 2,
    "ModelError": 2,
    "UnsupportedError": 2,
    "DataError": 3,
    "OutOfMemoryError": 4,
    "DivergedError": 5,
    "CheckFailedError": 5,
    "RefusedError": 6,
    "EnvironmentFault": 7,
    "ProcessLost": 7,
    "ProcessFailed": 1,
    "Stopped": 75,
    "Interrupted": 130,
}
"""The promise to schedulers, written down a second time on purpose."""


def ft(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def command_that_raises(error: BaseException, *arguments: str) -> Result:
    """A command of ours whose job fails."""
    program = typer.Typer(cls=Commands, pretty_exceptions_enable=False)

    @program.command()
    def work(as_json: AsJson = False) -> None:
        raise error

    @program.command()
    def rest() -> None:
        """A second command: Typer makes no group of one."""

    return CliRunner().invoke(program, ["work", *arguments])


def our_errors() -> list[type[FinetuneError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FinetuneError)]


def test_every_kind_of_error_has_its_promised_exit_code():
    assert {kind.__name__: kind.exit_code for kind in our_errors() if kind is not FinetuneError} == EXIT_CODES


@pytest.mark.parametrize("kind", [kind for kind in our_errors() if kind is not RecipeError])
def test_an_error_of_ours_is_a_message_with_place_and_remedy_and_its_exit_code(kind: type[FinetuneError]):
    result = command_that_raises(kind("it broke", where="rows.jsonl:3", hint="mend it"))
    assert result.exit_code == kind.exit_code
    title = "stopped" if kind in (errors.Stopped, errors.Interrupted) else "error"
    assert result.stderr == f"{title}: rows.jsonl:3: it broke\n  -> mend it\n"
    assert result.stdout == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_left_nothing_to_go_on_from_is_told_as_shells_do(number: int):
    assert command_that_raises(errors.Interrupted("stopped", number=number)).exit_code == 128 + number


def test_with_json_a_stop_is_no_error():
    result = command_that_raises(errors.Stopped("step 4 is saved", hint="go on"), "--json")
    assert json.loads(result.stdout) == {
        "event": "stopped", "code": 75, "what": "step 4 is saved", "where": None, "hint": "go on",
    }  # fmt: skip


def test_a_recipe_error_is_a_line_for_every_problem():
    problems = [Problem("r.yaml:3:5", "adapter.r", "too small", "raise it"), Problem("r.yaml:9:1", "", "no colon")]
    result = command_that_raises(RecipeError(problems))
    assert result.exit_code == 2
    assert result.stderr == ("error: r.yaml:3:5: adapter.r: too small\n  -> raise it\nerror: r.yaml:9:1: no colon\n")


def test_with_json_an_error_is_an_event_too():
    result = command_that_raises(errors.DataError("it broke", where="rows.jsonl:3", hint="mend it"), "--json")
    event = {"event": "error", "code": 3, "what": "it broke", "where": "rows.jsonl:3", "hint": "mend it"}
    assert [json.loads(line) for line in result.stdout.splitlines()] == [event]
    assert result.stderr == "error: rows.jsonl:3: it broke\n  -> mend it\n"


def test_with_json_a_recipe_error_is_an_event_with_every_problem():
    result = ft("train", "no-such-recipe.yaml", "--json")
    event = json.loads(result.stdout)
    assert (event["event"], event["code"]) == ("error", 2)
    assert [problem["where"] for problem in event["problems"]] == ["no-such-recipe.yaml"]
    assert result.exit_code == 2


def test_a_call_without_json_after_one_with_it_speaks_to_people():
    command_that_raises(errors.DataError("it broke"), "--json")
    assert ft("validate", "no-such-recipe.yaml").stdout == ""


def test_an_interrupt_is_130_without_a_traceback():
    result = command_that_raises(KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: str(error)[:30] or "MemoryError",
)
def test_memory_that_is_used_up_is_exit_code_4_with_the_knobs_to_turn(error: BaseException):
    result = command_that_raises(error)
    assert result.exit_code == 4
    assert result.stderr.startswith("error: out of memory\n")
    assert "training.micro_batch_size" in result.stderr


@pytest.mark.parametrize("error", [ZeroDivisionError("bug"), RuntimeError("a bug"), OSError("a bug")])
def test_a_bug_is_not_caught(error: Exception):
    result = command_that_raises(error)
    assert result.exception is error
    assert result.exit_code == 1


def test_the_version_is_the_packages():
    result = ft("--version")
    assert (result.exit_code, result.stdout) == (0, f"ft {__version__}\n")


def test_help_lists_the_commands_in_the_order_of_use():
    result = ft("--help")
    names = ["init", "import", "validate", "train", "eval", "generate", "merge", "explain", "schema"]
    places = [result.stdout.index(f"\n  {name} ") for name in names]
    assert places == sorted(places)
    assert "..." not in result.stdout.partition("Commands:")[2]  # each is told in a whole sentence
    assert result.exit_code == 0


@pytest.mark.parametrize("arguments", [["trian"], ["train", "r.yaml", "--nope"], ["generate"]])
def test_a_call_that_is_no_call_is_exit_code_2_and_says_how(arguments: list[str]):
    result = ft(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--resume", "auto"],
        ["r.yaml", "--resume", "runs/r"],
        ["r.yaml", "--resume", "auto", "--overwrite"],
        ["--resume", "runs/r", "--run-dir", "runs/s"],
    ],
)
def test_a_training_that_contradicts_itself_is_exit_code_2_and_says_how(arguments: list[str]):
    result = ft("train", *arguments)
    assert result.exit_code == 2
    assert "\n  -> " in result.stderr


@pytest.mark.parametrize(
    ("command", "what"),
    [("eval", "this folder holds no run, no trained weights and no model"), ("merge", "this is not a run directory")],
)
def test_a_directory_that_is_no_run_is_exit_code_2_and_json_where_asked(tmp_path: Path, command: str, what: str):
    result = ft(command, str(tmp_path), "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["what"] == what


def test_the_schema_is_json():
    result = ft("schema")
    assert result.exit_code == 0
    assert "adapter" in json.loads(result.stdout)["properties"]


def follow(act: Callable[[Callable], None], **options: bool) -> None:
    with console.reporting(options.get("quiet", False), options.get("as_json", False)) as report:
        act(report)


def test_warnings_of_ours_are_remarks_and_informations_notes(capsys: pytest.CaptureFixture[str]):
    def act(report: Callable) -> None:
        logging.getLogger("finetune.data").warning("left out %d rows", 2)
        logging.getLogger("finetune.models").info("auto is float32")

    follow(act)
    captured = capsys.readouterr()
    assert captured.err == "warning: left out 2 rows\nnote: auto is float32\n"
    assert captured.out == ""


def test_the_log_file_has_events_and_remarks_whatever_the_terminal_shows(tmp_path: Path):
    from finetune.run.events import Phase

    with console.reporting(quiet=True, as_json=False, log=tmp_path / "log.txt") as report:
        report(Phase("saving"))
        logging.getLogger("finetune.data").warning("left out %d rows", 2)
    first, second = (tmp_path / "log.txt").read_text().splitlines()
    assert first.endswith("INFO saving ...")
    assert second.endswith("WARNING left out 2 rows")
    logger = logging.getLogger("finetune")
    assert (logger.handlers, logger.propagate) == ([], True)

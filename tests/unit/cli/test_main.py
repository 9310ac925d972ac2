"""User errors are one message and an exit code; a bug keeps its traceback."""

from __future__ import annotations

import errno
import json
import logging
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from cli.event_log import event_handler
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
    "BadRow": 3,
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
"""The exit codes that schedulers rely on, repeated here so that a change in the code fails."""


def ft(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def command_that_raises(error: BaseException, *arguments: str) -> Result:
    """Run a command whose job raises `error`."""
    program = typer.Typer(cls=Commands, pretty_exceptions_enable=False)

    @program.command()
    def work(as_json: AsJson = False) -> None:
        raise error

    @program.command()
    def rest() -> None:
        """A second command: Typer makes no group of a single one."""

    return CliRunner().invoke(program, ["work", *arguments])


def our_errors() -> list[type[FinetuneError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FinetuneError)]


def test_error_classes_have_the_documented_exit_codes():
    assert {kind.__name__: kind.exit_code for kind in our_errors() if kind is not FinetuneError} == EXIT_CODES


@pytest.mark.parametrize("kind", [kind for kind in our_errors() if kind is not RecipeError])
def test_error_is_a_message_with_location_hint_and_exit_code(kind: type[FinetuneError]):
    further = {"reason": "malformed"} if kind is errors.BadRow else {}
    result = command_that_raises(kind("it broke", where="rows.jsonl:3", hint="fix it", **further))
    assert result.exit_code == kind.exit_code
    title = "stopped" if kind in (errors.Stopped, errors.Interrupted) else "error"
    assert result.stderr == f"{title}: rows.jsonl:3: it broke\n  -> fix it\n"
    assert result.stdout == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_without_a_checkpoint_exits_with_128_plus_its_number(number: int):
    assert command_that_raises(errors.Interrupted("stopped", number=number)).exit_code == 128 + number


def test_stop_with_json_is_a_stopped_event():
    result = command_that_raises(errors.Stopped("step 4 is saved", hint="resume"), "--json")
    assert json.loads(result.stdout) == {
        "event": "stopped", "code": 75, "what": "step 4 is saved", "where": None, "hint": "resume",
    }  # fmt: skip


def test_recipe_error_has_one_line_per_problem():
    problems = [Problem("r.yaml:3:5", "adapter.r", "too small", "raise it"), Problem("r.yaml:9:1", "", "no colon")]
    result = command_that_raises(RecipeError(problems))
    assert result.exit_code == 2
    assert result.stderr == ("error: r.yaml:3:5: adapter.r: too small\n  -> raise it\nerror: r.yaml:9:1: no colon\n")


def test_error_with_json_is_also_an_event():
    result = command_that_raises(errors.DataError("it broke", where="rows.jsonl:3", hint="fix it"), "--json")
    event = {"event": "error", "code": 3, "what": "it broke", "where": "rows.jsonl:3", "hint": "fix it"}
    assert [json.loads(line) for line in result.stdout.splitlines()] == [event]
    assert result.stderr == "error: rows.jsonl:3: it broke\n  -> fix it\n"


def test_recipe_error_with_json_is_an_event_with_every_problem():
    result = ft("train", "no-such-recipe.yaml", "--json")
    event = json.loads(result.stdout)
    assert (event["event"], event["code"]) == ("error", 2)
    assert [problem["where"] for problem in event["problems"]] == ["no-such-recipe.yaml"]
    assert result.exit_code == 2


def test_json_mode_does_not_leak_into_the_next_call():
    command_that_raises(errors.DataError("it broke"), "--json")
    assert ft("validate", "no-such-recipe.yaml").stdout == ""


def test_interrupt_exits_with_130_without_a_traceback():
    result = command_that_raises(KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("unable to mmap 538090408 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
        OSError(errno.ENOMEM, "Cannot allocate memory", "tokens.bin"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: str(error)[:30] or "MemoryError",
)
def test_out_of_memory_exits_with_4_and_hints(error: BaseException):
    result = command_that_raises(error)
    assert result.exit_code == 4
    assert result.stderr.startswith("error: out of memory\n")
    assert "training.micro_batch_size" in result.stderr


@pytest.mark.parametrize(
    "error", [RuntimeError("can't start new thread"), BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")]
)
def test_limit_of_processes_exits_with_7_and_names_it(error: BaseException):
    result = command_that_raises(error)
    assert result.exit_code == 7
    assert result.stderr.startswith("error: the system starts no further thread or process\n")
    assert "ulimit -u" in result.stderr


@pytest.mark.parametrize("error", [ZeroDivisionError("bug"), RuntimeError("a bug"), OSError("a bug")])
def test_bug_is_not_caught(error: Exception):
    result = command_that_raises(error)
    assert result.exception is error
    assert result.exit_code == 1


def test_version_is_that_of_the_package():
    result = ft("--version")
    assert (result.exit_code, result.stdout) == (0, f"ft {__version__}\n")


def test_help_lists_the_commands_in_the_order_of_use():
    result = ft("--help")
    names = ["init", "import", "validate", "train", "eval", "generate", "merge", "explain", "schema"]
    places = [result.stdout.index(f"\n  {name} ") for name in names]
    assert places == sorted(places)
    assert "..." not in result.stdout.partition("Commands:")[2]  # no summary is cut off
    assert result.exit_code == 0


def test_dry_run_has_its_former_name_as_hidden_alias(tmp_path: Path):
    (tmp_path / "bad.yaml").write_text("adapter: [")
    former, current = (ft(command, str(tmp_path / "bad.yaml")) for command in ("rehearse", "dry-run"))
    assert (former.exit_code, current.exit_code) == (2, 2)
    assert former.stderr.splitlines()[0] == "note: `rehearse` is now `ft dry-run`"
    assert former.stderr.splitlines()[1:] == current.stderr.splitlines()
    assert "rehearse" not in ft("--help").stdout


@pytest.mark.parametrize("arguments", [["trian"], ["train", "r.yaml", "--nope"], ["generate"]])
def test_invalid_arguments_exit_with_2_and_show_usage(arguments: list[str]):
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
def test_contradicting_train_options_exit_with_2_and_a_hint(arguments: list[str]):
    result = ft("train", *arguments)
    assert result.exit_code == 2
    assert "\n  -> " in result.stderr


@pytest.mark.parametrize(
    ("command", "what"),
    [("eval", "this folder holds no run, no trained weights and no model"), ("merge", "this is not a run directory")],
)
def test_directory_without_a_run_exits_with_2_and_json(tmp_path: Path, command: str, what: str):
    result = ft(command, str(tmp_path), "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["what"] == what


def test_schema_is_json():
    result = ft("schema")
    assert result.exit_code == 0
    assert "adapter" in json.loads(result.stdout)["properties"]


def follow(act: Callable[[Callable], None], **options: bool) -> None:
    with event_handler(options.get("quiet", False), options.get("as_json", False)) as on_event:
        act(on_event)


def test_log_records_are_shown_as_warnings_and_notes(capsys: pytest.CaptureFixture[str]):
    def act(on_event: Callable) -> None:
        logging.getLogger("finetune.data").warning("dropped %d rows", 2)
        logging.getLogger("finetune.models").info("auto is float32")

    follow(act)
    captured = capsys.readouterr()
    assert captured.err == "warning: dropped 2 rows\nnote: auto is float32\n"
    assert captured.out == ""


def test_log_file_has_events_and_remarks_in_quiet_mode(tmp_path: Path):
    from finetune.run.events import Phase

    with event_handler(quiet=True, as_json=False, log=tmp_path / "log.txt") as on_event:
        on_event(Phase("saving"))
        logging.getLogger("finetune.data").warning("dropped %d rows", 2)
    first, second = (tmp_path / "log.txt").read_text().splitlines()
    assert first.endswith("INFO saving ...")
    assert second.endswith("WARNING dropped 2 rows")
    logger = logging.getLogger("finetune")
    assert (logger.handlers, logger.propagate) == ([], True)

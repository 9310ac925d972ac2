"""The Typer app: commands in the order of help, and errors as messages and exit codes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from finetune import __version__
from finetune.errors import (
    FinetuneError,
    Interrupted,
    ProcessLost,
    Stopped,
    as_machine_fault,
)
from finetune.run import distributed
from finetune.run.signals import ended_by_signals, interrupted_exit_code

from .chat import chat
from .diff import diff
from .dry_run import dry_run, dry_run_alias
from .evaluate import evaluate
from .explain import explain
from .export import export
from .generate import generate
from .importing import import_recipe
from .init import init
from .merge import merge
from .methods import methods
from .output import show_error, show_note, show_result, use_json
from .plan import plan
from .preview import preview
from .quantize import quantize
from .report import report
from .reproduce import reproduce
from .runs import app as runs
from .schema import schema
from .sweep import sweep
from .train import train
from .validate import validate
from .watch import watch


class Commands(TyperGroup):
    """All commands: user errors become a message and an exit code; a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command and turn its errors into exit codes."""
        use_json(False)  # a second call in this process must not keep the --json of the first
        try:
            with ended_by_signals(), _showing_warnings():
                return super().invoke(ctx)
        except FinetuneError as error:
            raise typer.Exit(_show_and_exit_code(error)) from None
        except KeyboardInterrupt as interrupt:
            if not distributed.has_launcher():
                show_note(" ".join(["interrupted", *map(str, interrupt.args)]))
            raise typer.Exit(_recorded_exit_code(interrupt, interrupted_exit_code(interrupt))) from None
        except typer.Exit:
            raise
        except Exception as error:
            known = as_machine_fault(error)
            if known is not None:
                raise typer.Exit(_show_and_exit_code(known)) from None
            if not distributed.has_launcher():
                raise
            raise typer.Exit(_recorded_exit_code(error, 1)) from None


@contextmanager
def _showing_warnings() -> Iterator[None]:
    """Show warnings of the library while no job reports them, such as those on the keys of a recipe."""
    logger, handler = logging.getLogger("finetune"), _WarningHandler(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _WarningHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # A launcher has read the same recipe, and shows its warnings.
        if distributed.Rank.here().is_main and not distributed.has_launcher():
            show_note(f"warning: {record.getMessage()}")


def _show_and_exit_code(error: FinetuneError) -> int:
    """Show an error, unless the launcher or the main rank shows it; returns the exit code."""
    is_shown = distributed.Rank.here().is_main or not isinstance(error, Stopped | Interrupted | ProcessLost)
    if is_shown and not distributed.has_launcher():
        show_error(error)
    return _recorded_exit_code(error, error.exit_code)


def _recorded_exit_code(error: BaseException, code: int) -> int:
    """Write the cause of the exit for the launcher; returns the exit code.

    Under a launcher a stop by signal returns 0: a failure would make it restart all ranks.
    """
    rank_exit = distributed.RankExit.of(error)
    rank_exit.write()
    return 0 if rank_exit.is_stop and distributed.has_launcher() else code


app = typer.Typer(
    name="ft",
    cls=Commands,
    help="Fine-tune language models: one recipe, one command, verified results.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(is_requested: bool) -> None:
    if is_requested:
        show_result(f"ft {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of `ft` itself."""


app.command()(init)
app.command("import")(import_recipe)
app.command()(validate)
app.command()(preview)
app.command()(plan)
app.command("dry-run")(dry_run)
app.command("rehearse", hidden=True)(dry_run_alias)  # the former name
app.command()(train)
app.command()(watch)
app.command()(sweep)
app.command("eval")(evaluate)
app.command()(report)
app.command()(generate)
app.command()(chat)
app.command()(merge)
app.command()(quantize)
app.command()(export)
app.add_typer(runs, name="runs")
app.command()(diff)
app.command()(reproduce)
app.command()(methods)
app.command()(explain)
app.command()(schema)

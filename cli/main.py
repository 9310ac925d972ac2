"""The Typer app: commands in the order of help, and errors as messages and exit codes."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from finetune import __version__
from finetune.errors import FinetuneError, as_out_of_memory

from . import console
from .chat import chat
from .diff import diff
from .evaluate import evaluate
from .export import export
from .generate import generate
from .merge import merge
from .methods import methods
from .preview import preview
from .quantize import quantize
from .reproduce import reproduce
from .runs import app as runs
from .schema import schema
from .train import train
from .validate import validate

INTERRUPTED = 130


class Commands(TyperGroup):
    """All commands: what the user can mend is one message and an exit code; a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        console.use_json(False)  # until the command's own --json is read
        try:
            return super().invoke(ctx)
        except FinetuneError as error:
            console.show_error(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            console.show_note("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except (MemoryError, RuntimeError) as error:
            if (shortage := as_out_of_memory(error)) is None:
                raise
            console.show_error(shortage)
            raise typer.Exit(shortage.exit_code) from None


app = typer.Typer(
    name="ft",
    cls=Commands,
    help="Fine-tune language models: one recipe, one command, a result to trust.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(asked: bool) -> None:
    if asked:
        console.show_result(f"ft {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of `ft` itself."""


app.command()(validate)
app.command()(preview)
app.command()(train)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(chat)
app.command()(merge)
app.command()(quantize)
app.command()(export)
app.add_typer(runs, name="runs")
app.command()(diff)
app.command()(reproduce)
app.command()(methods)
app.command()(schema)


def run() -> None:
    """The entry point of the `ft` script."""
    app()

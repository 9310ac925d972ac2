"""The Typer app: commands in the order of help, and errors as messages and exit codes."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from finetune import __version__
from finetune.errors import FinetuneError, OutOfMemoryError

from . import console
from .evaluate import evaluate
from .generate import generate
from .merge import merge
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
            if not _is_out_of_memory(error):
                raise
            shortage = OutOfMemoryError(
                "out of memory",
                hint="lower training.micro_batch_size and raise gradient_accumulation_steps by the same factor, "
                "or set training.gradient_checkpointing: true",
            )
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
app.command()(train)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(merge)
app.command()(schema)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is PyTorch's or Python's word for memory that is used up, on a GPU or a CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error) for words in ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED"))
    )


def run() -> None:
    """The entry point of the `ft` script."""
    app()

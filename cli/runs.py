"""`ft runs`: list runs and their states; `ft runs clean` frees disk space."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.errors import UsageError

from .options import AsJson
from .output import show_result
from .prompts import confirm
from .views.runs import show_removable, show_runs

Folder = Annotated[
    Path, typer.Option("--directory", metavar="DIR", help="A folder with runs, or the directory of one run.")
]

app = typer.Typer(help="List runs with state, step, loss and size.", invoke_without_command=True)


@app.callback()
def listing(ctx: typer.Context, directory: Folder = Path("runs"), as_json: AsJson = False) -> None:
    """List runs with state, step, loss and size."""
    if ctx.invoked_subcommand is not None:
        return
    from finetune.run.index import runs_in, summarize

    show_runs([summarize(run) for run in runs_in(directory)], directory, as_json)


@app.command()
def clean(
    directory: Folder = Path("runs"),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
) -> None:
    """Remove checkpoints of finished runs and leftovers of killed ones. Lists them and asks first."""
    from finetune.run.index import removable, remove, runs_in

    found = [each for run in runs_in(directory) for each in removable(run)]
    show_removable(found, directory)
    if not found:
        return
    if not yes and not confirm("Remove them?"):
        raise UsageError("nothing was removed", hint="answer yes, or add --yes")
    for each in found:
        remove(each)
    show_result(f"removed {len(found)}")

"""`ft report`: a run as a page to send, or several beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.errors import RefusedError, UsageError

from . import console
from .options import AsJson, Overwrite


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Directories of runs; of several, a comparison.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Page to write; of one run by default report.html in it."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the page of a run, or of several and what differs. Curves, data, answers, proofs, provenance."""
    from finetune.run.directory import RunDirectory
    from finetune.storage.files import write_text

    directories = [RunDirectory.open(run) for run in runs]
    if output is None and len(runs) > 1:
        raise UsageError("several runs need a file to write to", where="--output", hint="add --output comparison.html")
    if output and (output.is_dir() or (output.exists() and not overwrite)):
        raise RefusedError("the file is there already", where=str(output), hint="choose another, or add --overwrite")
    from finetune.report.run_metadata import RunMetadata

    facts = [RunMetadata.of(run) for run in directories]
    if len(directories) == 1:
        from finetune.report.run_page import run_page

        page = run_page(facts[0])
    else:
        from finetune.report.comparison_page import comparison_page
        from finetune.run.comparison import differences

        page = comparison_page(facts, [differences(directories[0], other) for other in directories[1:]])
    # A run's own page is made of its files and is made anew; of others nothing is lost unasked.
    target = output or directories[0].report
    write_text(target, page)
    console.show_page(target, as_json)

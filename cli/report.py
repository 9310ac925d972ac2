"""`ft report`: an HTML page of one run, or a comparison of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.errors import UsageError

from .options import AsJson, Overwrite
from .views.runs import show_page


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of runs; several are compared.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="FILE", help="Page to write. Default for one run: report.html in its directory."
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the page of a run, or a comparison of several. Curves, data, samples, verifications, provenance."""
    from finetune.run.directory import RunDirectory
    from finetune.storage.files import check_output, write_text

    directories = [RunDirectory.open(run) for run in runs]
    if output is None and len(runs) > 1:
        raise UsageError(
            "a comparison of several runs needs an output file", where="--output", hint="add --output comparison.html"
        )
    if output:
        check_output(output, overwrite)
    from finetune.report.run_metadata import RunMetadata

    facts = [RunMetadata.of(run) for run in directories]
    if len(directories) == 1:
        from finetune.report.run_page import run_page

        page = run_page(facts[0])
    else:
        from finetune.report.comparison_page import comparison_page
        from finetune.run.comparison import differences

        page = comparison_page(facts, [differences(directories[0], other) for other in directories[1:]])
    # The page in the run directory is generated from its files, so it is replaced without --overwrite.
    target = output or directories[0].report
    write_text(target, page)
    show_page(target, as_json)

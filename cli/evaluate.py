"""`ft eval`: the base and the run side by side."""

from __future__ import annotations

from . import console
from .options import AsJson, Quiet, RunPath


def evaluate(run: RunPath, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Compare a run with its base on the held-out rows: loss, and answers against the references."""
    from finetune.run.directory import RunDirectory

    directory = RunDirectory.open(run)
    with console.reporting(quiet, as_json) as report:
        from finetune.jobs.evaluate import evaluate as evaluate_job

        comparison = evaluate_job(directory, report)
    console.show_comparison(comparison.to_json(), run, as_json)

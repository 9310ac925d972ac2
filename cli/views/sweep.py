"""Trials and results of `ft sweep`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import CheckFailedError
from finetune.formatting import value as value_text

from ..output import short_path, show_json, show_note, show_result

if TYPE_CHECKING:
    from finetune.recipe.sections.sweep import Sweep
    from finetune.run.sweep_trials import SweepDirectory, Trial, TrialRun


def show_trial(trial: Trial, run: TrialRun, section: Sweep, as_json: bool) -> None:
    """Print the number and values of the trial of the next run, and which repeat it is."""
    if as_json:
        facts = {"trial": trial.number, "repeat": run.repeat, "values": trial.values, "run": str(run.path)}
        show_json({"event": "trial", **facts})
        return
    from finetune.run.sweep_trials import short_names

    names = short_names(list(trial.values))
    values = "  ".join(f"{names[key]} {value_text(value)}" for key, value in trial.values.items())
    repeat = f", run {run.repeat} of {section.repeats}" if section.repeats > 1 else ""
    show_note(f"trial {trial.number} of {section.most_trials}{repeat}: {values}", "1")


def show_sweep(directory: SweepDirectory, recipe: Path, as_json: bool) -> None:
    """Print all trials, the best first, and the command that trains with its values.

    Raises:
        CheckFailedError: No trial has a result.
    """
    from finetune.run.sweep_trials import arguments_of, noise_remark, trial_table

    ranked = directory.ranked()
    if as_json:
        for trial in directory.trials():
            show_json({"event": "trial_done", **_facts(trial, directory)})
    else:
        from rich.table import Table

        from ..terminal import Console

        head, rows = trial_table(directory)
        table = Table(box=None, padding=(0, 2, 0, 0))
        for title in head:
            table.add_column(title, overflow="fold", justify="left" if title == "trial" else "right")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    if not ranked:
        raise CheckFailedError(
            "no trial has a result", where=str(short_path(directory.path)), hint="see the causes in the table above"
        )
    if not as_json:
        if remark := noise_remark(directory):
            show_note(remark)
        show_result(f"page: {short_path(directory.page)}\nbest: ft train {recipe} {arguments_of(ranked[0])}")


def _facts(trial: Trial, directory: SweepDirectory) -> dict[str, Any]:
    """A trial as JSON: mean, interval and single runs; null where nothing was measured."""
    return {
        "trial": trial.number,
        "values": trial.values,
        "goal": directory.goal,
        "score": asdict(trial.scores) if trial.scores else None,
        "validation_loss": trial.loss,
        "failure": trial.failure,
        "runs": [{**asdict(run), "path": str(run.path)} for run in trial.runs],
    }

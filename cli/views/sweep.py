"""Trials and results of `ft sweep`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import CheckFailedError
from finetune.formatting import value as value_text

from ..output import short_path, show_json, show_note, show_result

if TYPE_CHECKING:
    from finetune.run.sweep_trials import SweepDirectory, Trial


def show_trial(trial: Trial, total: int, as_json: bool) -> None:
    """Print the number and values of the next trial."""
    if as_json:
        show_json({"event": "trial", "trial": trial.number, "values": trial.values, "run": str(trial.path)})
        return
    from finetune.run.sweep_trials import short_names

    names = short_names(list(trial.values))
    values = "  ".join(f"{names[key]} {value_text(value)}" for key, value in trial.values.items())
    show_note(f"trial {trial.number} of {total}: {values}", "1")


def show_sweep(directory: SweepDirectory, recipe: Path, as_json: bool) -> None:
    """Print all trials, the best first, and the command that trains with its values.

    Raises:
        CheckFailedError: No trial has a result.
    """
    from finetune.run.sweep_trials import arguments_of, best_of, trial_table

    trials = directory.trials()
    best = best_of(trials)
    if as_json:
        for trial in trials:
            show_json({"event": "trial_done", **asdict(trial), "path": str(trial.path)})
    else:
        from rich.table import Table

        from ..terminal import Console

        head, rows = trial_table(trials)
        table = Table(box=None, padding=(0, 2, 0, 0))
        for title in head:
            table.add_column(title, overflow="fold", justify="left" if title == "trial" else "right")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    if best is None:
        raise CheckFailedError(
            "no trial has a result", where=str(short_path(directory.path)), hint="see the causes in the table above"
        )
    if not as_json:
        show_result(f"page: {short_path(directory.page)}\nbest: ft train {recipe} {arguments_of(best)}")

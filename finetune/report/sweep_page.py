"""`sweep.html`: the trials of a sweep, the best first, and the validation loss by each swept value."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from finetune.formatting import in_html
from finetune.formatting import value as as_text
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.sweep import Choice, LogUniform, Swept
from finetune.report import training_curves
from finetune.report.chart import Axis, Series, chart
from finetune.report.page import document, section, table
from finetune.report.run_page import STYLE
from finetune.run.directory import RunDirectory
from finetune.run.history import History
from finetune.run.sweep_trials import SweepDirectory, Trial, best_of, trial_table

DRAWN = 6
"""Number of best trials whose curves are drawn: as many as there are distinct colours."""


def sweep_page(directory: SweepDirectory, recipe: Recipe) -> str:
    """The page of a sweep in any state.

    Args:
        directory: Directory of the sweep.
        recipe: Recipe with a section `sweep`.
    """
    assert recipe.sweep is not None
    trials = directory.trials()
    done = sorted((trial for trial in trials if trial.loss is not None), key=lambda trial: (trial.loss, trial.number))
    histories = [(trial.name, History.of(RunDirectory(trial.path))) for trial in done[:DRAWN]]
    name = directory.path.name
    return document(
        f"{name}: sweep",
        training_curves.STYLE + STYLE,
        [
            f"<header><h1>{in_html(name)}</h1><p>{len(trials)} of {recipe.sweep.trials} trials, each a training run; "
            f"sampler {recipe.sweep.chosen_sampler}, seed {recipe.sweep.seed}</p></header>",
            _best(trials),
            section("Validation loss by value", _effects(recipe.sweep.keys, done)),
            section("Trials, the best first", table(*trial_table(trials))),
            section("Training curves of the best trials", training_curves.compared(histories) if histories else ""),
        ],
    )


def _best(trials: Sequence[Trial]) -> str:
    best = best_of(trials)
    if best is None:
        return ""
    values = ", ".join(f"{in_html(key)} = {in_html(as_text(value))}" for key, value in best.values.items())
    return (
        f'<p class="result">Best: trial <b>{best.number}</b>, validation loss <b>{best.loss:.4f}</b>, '
        f"with {values}.</p>"
    )


def _effects(keys: Sequence[Swept], done: Sequence[Trial]) -> str:
    losses = sorted((float(trial.number), trial.loss or 0.0) for trial in done)
    lowest = zip((number for number, _ in losses), accumulate((loss for _, loss in losses), min), strict=True)
    in_time = chart(
        "Validation loss by trial",
        [
            Series("trial", losses, dotted=True, connected=False),
            Series("lowest so far", list(lowest), color=2),
        ],
        training_curves.LOSS,
        Axis(lambda number: f"{number:.0f}", name="trial", integer=True),
    )
    return training_curves.charts([in_time], [_effect(swept, done) for swept in keys])


def _effect(swept: Swept, done: Sequence[Trial]) -> str:
    """A scatter chart of the trials by one swept value."""
    if isinstance(swept, Choice):
        choices = [as_text(choice) for choice in swept.choices]
        places = {trial.number: swept.choices.index(trial.values[swept.key]) for trial in done}
        along = Axis(lambda place: choices[round(place)], name=swept.key, integer=True)
        points = [(float(places[trial.number]), trial.loss or 0.0) for trial in done]
    else:
        along = Axis(as_text, may_be_logarithmic=isinstance(swept, LogUniform), name=swept.key)
        points = [(float(trial.values[swept.key]), trial.loss or 0.0) for trial in done]
    return chart(
        swept.key, [Series(swept.key, sorted(points), dotted=True, connected=False)], training_curves.LOSS, along
    )

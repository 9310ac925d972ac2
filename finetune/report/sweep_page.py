"""`sweep.html`: the trials of a sweep, the best first, the grid of their values, and the goal by each swept value."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, product
from typing import Any

from finetune.formatting import in_html
from finetune.formatting import value as as_text
from finetune.recipe.sections.sweep import Choice, LogUniform, Swept
from finetune.report import training_curves
from finetune.report.chart import Axis, Series, chart
from finetune.report.page import document, section, table
from finetune.report.run_page import STYLE
from finetune.run.directory import RunDirectory
from finetune.run.history import History
from finetune.run.sweep_trials import SweepDirectory, Trial, noise_remark, short_names, trial_table

DRAWN = 6
"""Number of best trials whose curves are drawn: as many as there are distinct colours."""

MOST_CELLS = 400
"""Cells of the grid that are shown; a larger grid is no overview."""

SHADES = 5

GRID_STYLE = """
.heat td, .heat thead th { text-align: center; } .heat td.best { font-weight: 700; outline: 2px solid var(--good); }
.shade1 { background: color-mix(in srgb, var(--good) 8%, transparent); }
.shade2 { background: color-mix(in srgb, var(--good) 16%, transparent); }
.shade3 { background: color-mix(in srgb, var(--good) 26%, transparent); }
.shade4 { background: color-mix(in srgb, var(--good) 38%, transparent); }
"""


def sweep_page(directory: SweepDirectory) -> str:
    """The page of a sweep in any state.

    Args:
        directory: Directory of the sweep.
    """
    sweep = directory.section
    trials, ranked = directory.trials(), directory.ranked()
    histories = [(trial.runs[0].name, History.of(RunDirectory(trial.runs[0].path))) for trial in ranked[:DRAWN]]
    name = directory.path.name
    runs = "a training run" if sweep.repeats == 1 else f"{sweep.repeats} training runs with different seeds"
    goal = f"{'highest' if sweep.maximizes else 'lowest'} {directory.goal}"
    return document(
        f"{name}: sweep",
        training_curves.STYLE + STYLE + GRID_STYLE,
        [
            f"<header><h1>{in_html(name)}</h1><p>{len(trials)} of {sweep.most_trials} trials, each {runs}; "
            f"goal: {in_html(goal)}; sampler {sweep.chosen_sampler}, seed {sweep.seed}</p></header>",
            _best(directory, ranked),
            section("Grid", _grid(directory)),
            section(f"{directory.goal.capitalize()} by value", _effects(directory, ranked)),
            section("Trials, the best first", table(*trial_table(directory))),
            section("Training curves of the best trials", training_curves.compared(histories) if histories else ""),
        ],
    )


def _best(directory: SweepDirectory, ranked: Sequence[Trial]) -> str:
    if not ranked:
        return ""
    best = ranked[0]
    values = ", ".join(f"{in_html(key)} = {in_html(as_text(value))}" for key, value in best.values.items())
    remark = in_html(noise_remark(directory))
    return (
        f'<p class="result">Best: trial <b>{best.number}</b>, {in_html(directory.goal)} <b>{best.scores}</b>, '
        f"with {values}.</p>" + (f"<p>{remark}</p>" if remark else "")
    )


def _grid(directory: SweepDirectory) -> str:
    """The goal of each combination: a table of the last two keys for each combination of the others."""
    combinations = directory.section.combinations
    if combinations is None or combinations > MOST_CELLS:
        return ""
    keys = list(directory.section.keys)
    names = short_names([swept.key for swept in keys])
    *others, rows, columns = [None, *keys] if len(keys) == 1 else keys
    tables = []
    for fixed in product(*(_values(swept) for swept in others if swept is not None)):
        settings = dict(zip((swept.key for swept in others if swept is not None), fixed, strict=True))
        title = ", ".join(f"{names[key]} {as_text(value)}" for key, value in settings.items())
        tables.append((f"<h3>{in_html(title)}</h3>" if title else "") + _table(directory, settings, rows, columns))
    return "".join(tables)


def _values(swept: Swept | None) -> Sequence[Any]:
    return [None] if swept is None else swept.values or []


def _table(directory: SweepDirectory, settings: dict[str, Any], rows: Swept | None, columns: Swept | None) -> str:
    """One table of cells; without a key for the rows, one row."""
    assert columns is not None, "a sweep has a key"
    names = short_names([swept.key for swept in directory.section.keys])
    trials, ranked = directory.trials(), directory.ranked()
    corner = (f"{names[rows.key]} \\ " if rows else "") + names[columns.key]
    head = "".join(f'<th scope="col">{in_html(as_text(value))}</th>' for value in _values(columns))
    lines = []
    for row in _values(rows):
        at_row = settings | ({rows.key: row} if rows else {})
        cells = "".join(_cell(at_row | {columns.key: column}, trials, ranked) for column in _values(columns))
        lines.append(f'<tr><th scope="row">{in_html(as_text(row)) if rows else ""}</th>{cells}</tr>')
    top = f'<thead><tr><th scope="col">{in_html(corner)}</th>{head}</tr></thead>'
    return f'<div class="scroll"><table class="numbers heat">{top}<tbody>{"".join(lines)}</tbody></table></div>'


def _cell(values: dict[str, Any], trials: Sequence[Trial], ranked: Sequence[Trial]) -> str:
    """A combination: its goal, shaded from the worst to the best, or its state."""
    trial = next((trial for trial in trials if dict(trial.values) == values), None)
    if trial is None:
        return "<td>not tried</td>"
    if trial.scores is None:
        return f"<td>{'failed' if trial.failure else 'not finished'}</td>"
    means = [each.scores.mean for each in ranked if each.scores]
    best, worst = means[0], means[-1]
    share = (trial.scores.mean - worst) / (best - worst) if best != worst else 1.0
    kind = f"shade{round(share * (SHADES - 1))}" + (" best" if trial.number == ranked[0].number else "")
    return f'<td class="{kind}">{trial.scores}</td>'


def _effects(directory: SweepDirectory, done: Sequence[Trial]) -> str:
    points = sorted((float(trial.number), trial.scores.mean) for trial in done if trial.scores)
    so_far = max if directory.section.maximizes else min
    best = zip((number for number, _ in points), accumulate((score for _, score in points), so_far), strict=True)
    in_time = chart(
        f"{directory.goal.capitalize()} by trial",
        [
            Series("trial", points, dotted=True, connected=False),
            Series("best so far", list(best), color=2),
        ],
        training_curves.LOSS,
        Axis(lambda number: f"{number:.0f}", name="trial", integer=True),
    )
    return training_curves.charts([in_time], [_effect(swept, done) for swept in directory.section.keys])


def _effect(swept: Swept, done: Sequence[Trial]) -> str:
    """A scatter chart of the trials by one swept value."""
    if isinstance(swept, Choice):
        choices = [as_text(choice) for choice in swept.choices]
        along = Axis(lambda place: choices[round(place)], name=swept.key, integer=True)
    else:
        along = Axis(as_text, may_be_logarithmic=isinstance(swept, LogUniform), name=swept.key)
    points = [(_place(swept, trial), trial.scores.mean) for trial in done if trial.scores]
    return chart(
        swept.key, [Series(swept.key, sorted(points), dotted=True, connected=False)], training_curves.LOSS, along
    )


def _place(swept: Swept, trial: Trial) -> float:
    """Position of a trial on the axis of a key: the index of a choice, or the number."""
    value = trial.values[swept.key]
    return float(swept.choices.index(value)) if isinstance(swept, Choice) else float(value)

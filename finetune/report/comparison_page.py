"""Comparison of several runs on one page: results side by side, curves in one chart, and differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from finetune.formatting import count, duration, in_html, memory
from finetune.recipe.sections.evaluation import VALIDATION
from finetune.report import training_curves
from finetune.report.page import document, section, table
from finetune.report.run_metadata import RunMetadata
from finetune.report.run_page import SCORES, SHOWN_ANSWERS, answer_card, device, score
from finetune.report.run_page import STYLE as RUN_STYLE
from finetune.run.comparison import Difference


def comparison_page(runs: Sequence[RunMetadata], differences: Sequence[Sequence[Difference]]) -> str:
    """The page.

    Args:
        runs: At least two.
        differences: For each run but the first, its differences from the first.
    """
    names = [run.name for run in runs]
    first, *others = names
    return document(
        " and ".join(names),
        training_curves.STYLE + RUN_STYLE,
        [
            f"<header><h1>{in_html(' and '.join(names))}</h1><p>{len(runs)} training runs side by side</p></header>",
            section("Results", _results(runs)),
            section("Training curves", training_curves.compared([(run.name, run.history) for run in runs])),
            section("Answers", _answers(runs)),
            section(
                "Differences",
                *(_differences(first, name, found) for name, found in zip(others, differences, strict=True)),
            ),
        ],
    )


def _results(runs: Sequence[RunMetadata]) -> str:
    """One row per figure, one column per run."""
    rows: list[tuple[str, Callable[[RunMetadata], str]]] = [
        ("state", lambda run: run.state),
        ("base", lambda run: run.base),
        ("method", lambda run: run.method),
        ("validation loss before", _before),
        ("validation loss", _after),
        *((title, _scored(VALIDATION, name)) for name, title in SCORES.items()),
        *_scores_of_tasks(runs),
        ("steps", lambda run: _of_last(run, "step", str)),
        ("time", lambda run: _of_last(run, "seconds", duration)),
        ("tokens", lambda run: _of_last(run, "tokens", count)),
        ("peak memory", lambda run: _of_last(run, "peak_memory_bytes", memory)),
        ("trainable parameters", _trainable_parameters),
        ("device", device),
    ]
    cells = [[title, *(of(run) for run in runs)] for title, of in rows]
    return table(["", *(run.name for run in runs)], [row for row in cells if any(row[1:])])


def _before(run: RunMetadata) -> str:
    found = run.history.validations
    return f"{found[0].loss:.4f}" if found and found[0].step == 0 else ""


def _after(run: RunMetadata) -> str:
    return f"{run.history.result[1]:.4f}" if run.history.result else ""


def _scores_of_tasks(runs: Sequence[RunMetadata]) -> list[tuple[str, Callable[[RunMetadata], str]]]:
    """The metrics of `ft eval` in tasks beside the validation rows."""
    measured = [
        (task, name)
        for run in runs
        for task, scores in run.evaluation.get("tasks", {}).items()
        for name in scores
        if task != VALIDATION
    ]
    return [(f"{task}: {SCORES.get(name, name)}", _scored(task, name)) for task, name in dict.fromkeys(measured)]


def _scored(task: str, name: str) -> Callable[[RunMetadata], str]:
    def of(run: RunMetadata) -> str:
        found = run.evaluation.get("tasks", {}).get(task, {}).get(name)
        return score(found.get("unit"), found.get("value")) if found else ""

    return of


def _trainable_parameters(run: RunMetadata) -> str:
    started = run.provenance.get("started")
    return count(started["trainable_parameters"]) if started else ""


def _of_last(run: RunMetadata, name: str, words: Callable[[Any], str]) -> str:
    return words(getattr(run.history.steps[-1], name)) if run.history.steps else ""


def _answers(runs: Sequence[RunMetadata]) -> str:
    """Answers of the evaluated runs to the prompts that all of them were given."""
    answered = [(run.name, {each.get("prompt", ""): each for each in run.answers}) for run in runs if run.answers]
    if len(answered) < 2:
        return ""
    shared = [prompt for prompt in answered[0][1] if all(prompt in answers for _, answers in answered)]
    cards = []
    for prompt in shared[:SHOWN_ANSWERS]:
        references = answered[0][1][prompt].get("references", [])
        cells = [("reference", " | ".join(references), False)]
        for name, answers in answered:
            text = answers[prompt].get("answer", "")
            cells.append((name, text, text.strip() in [each.strip() for each in references]))
        cards.append(answer_card(prompt, cells))
    return "".join(cards)


def _differences(first: str, other: str, found: Sequence[Difference]) -> str:
    rows = [[f"{each.part}: {each.key}", each.first, each.second] for each in found if each.part != "results"]
    title = f"<h3>{in_html(first)} and {in_html(other)}</h3>"
    nothing = "<p>Recipe, data and versions are the same.</p>"
    return title + (table(["", first, other], rows, numbers=False) or nothing)

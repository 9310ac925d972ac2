"""Differences between two runs in recipe, data, versions and results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune.recipe.diff import changes
from finetune.recipe.load import load_recipe
from finetune.run.directory import RunDirectory
from finetune.run.evaluation_results import read_results
from finetune.run.index import summarize
from finetune.run.provenance import read_provenance


@dataclass(frozen=True)
class Difference:
    """One value that differs between two runs.

    Attributes:
        part: `recipe`, `data`, `versions` or `results`.
        key: Name of the value, such as a recipe key.
        first: Value in the first run, as text.
        second: Value in the second run.
    """

    part: str
    key: str
    first: str
    second: str


def differences(first: RunDirectory, second: RunDirectory) -> list[Difference]:
    """All differences between two runs; resolved recipes are compared, so that differing defaults show too."""
    before, after = (load_recipe(run.recipe).recipe for run in (first, second))
    recipe = [Difference("recipe", change.key, change.old, change.new) for change in changes(before, after)]
    return [*recipe, *_between("data", _data, first, second), *_between("versions", _versions, first, second),
            *_between("results", _results, first, second)]  # fmt: skip


def _between(part: str, read: Any, first: RunDirectory, second: RunDirectory) -> Iterator[Difference]:
    before, after = read(first), read(second)
    for key in {**before, **after}:
        if before.get(key) != after.get(key):
            yield Difference(part, key, _as_text(before.get(key)), _as_text(after.get(key)))


def _data(run: RunDirectory) -> dict[str, Any]:
    """The hash of every file, or the whole record of a hub data set, by its index among the sources."""
    return {
        f"{number}. {record.get('file', 'hub data set')}": record.get("sha256") or json.dumps(record, sort_keys=True)
        for number, record in enumerate(read_provenance(run.provenance).get("data", []), start=1)
    }


def _versions(run: RunDirectory) -> dict[str, Any]:
    provenance = read_provenance(run.provenance)
    facts = {key: provenance.get(key) for key in ("ft", "python", "platform", "processors", "device", "processes")}
    base = provenance.get("base", {})
    return {**facts, **provenance.get("packages", {}), "base fingerprint": base.get("fingerprint")}


def _results(run: RunDirectory) -> dict[str, Any]:
    summary = summarize(run)
    results = {
        "state": summary.state,
        "step": summary.step,
        "loss": summary.loss,
        "validation loss": summary.validation_loss,
    }
    for task, scores in read_results(run).get("tasks", {}).items():
        results |= {f"eval {task} {metric}": score.get("value") for metric, score in scores.items()}
    return results


def _as_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = "-" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"

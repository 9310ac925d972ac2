"""The data report, `data_report.json`: outcome of every row, and statistics of the rows used."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from finetune.data.batch_plan import BatchPlan
from finetune.data.dataset import Datasets, TokenizedDataset

PERCENTILES = (50, 90, 95, 99)


def data_report(datasets: Datasets, batch_plan: BatchPlan) -> dict[str, Any]:
    """The data report as JSON values.

    `read + added = kept + too_long + sum(bad)`, where `added` counts rows added by splitting, and `bad` the rows that
    cannot be used, by reason. `used` counts the kept rows in this data set: with weights, some kept
    rows are in no data set; with a validation fraction, some are in the other one. All later numbers are of used rows.
    """
    report = {
        "train": _split_report(datasets.train, datasets.validation),
        "validation": _split_report(datasets.validation, None),
    }
    if batch_plan.packs is not None:
        packs = batch_plan.packs
        report["packing"] = {"packs": len(packs), "pack_length": packs.capacity, "fill": round(packs.fill, 4)}
    return report


def _split_report(split: TokenizedDataset, validation: TokenizedDataset | None) -> dict[str, Any]:
    sources = []
    for index, source in enumerate(split.sources):
        description = {"source": source.section.place, "format": source.store.format}
        numbers = _numbers(split.of_source(index), validation)
        found = {"notes": {text: asdict(note) for text, note in source.store.report.notes.items()}}
        sources.append({**description, **source.store.counts.to_json(), **numbers, **found, "content": source.content})
    return {**split.counts.to_json(), **_numbers(split, validation), "sources": sources}


def _numbers(split: TokenizedDataset, validation: TokenizedDataset | None) -> dict[str, Any]:
    """Statistics of the used rows; `tokens` and `target_tokens` overwrite those of the kept rows."""
    lengths, digests = split.lengths, split.column("digests")
    tokens, targets = int(lengths.sum()), int(split.column("targets").sum())
    numbers: dict[str, Any] = {
        "used": len(split),
        "tokens": tokens,
        "target_tokens": targets,
        "share_trained": round(targets / tokens, 4) if tokens else 0.0,
        "lengths": _spread(lengths),
        "duplicates": len(digests) - len(np.unique(digests)),
    }
    if validation is not None:
        numbers["in_validation"] = int(np.isin(digests, validation.column("digests")).sum())
        numbers["prompts_in_validation"] = _rows_of_validation_prompts(split, validation)
    return numbers


def _rows_of_validation_prompts(split: TokenizedDataset, validation: TokenizedDataset) -> int:
    """Number of examples whose prompt a validation row has, too."""
    prompts, theirs = split.column("prompts"), validation.column("prompts")
    return int(np.isin(prompts, theirs[theirs != 0]).sum())


def _spread(lengths: np.ndarray) -> dict[str, int]:
    """Minimum, percentiles and maximum of the lengths, in tokens."""
    if not len(lengths):
        return {}
    between = {f"p{percent}": int(np.percentile(lengths, percent, method="higher")) for percent in PERCENTILES}
    return {"shortest": int(lengths.min()), **between, "longest": int(lengths.max())}

"""What became of every row: the numbers of `data_report.json`."""

from __future__ import annotations

from typing import Any

import numpy as np

from finetune.data.batch_plan import BatchPlan
from finetune.data.dataset import Datasets, TokenizedDataset

PERCENTILES = (50, 90, 95, 99)


def data_report(rows: Datasets, layout: BatchPlan) -> dict[str, Any]:
    """The report on a recipe's rows, as JSON values.

    `rows read + added = kept + too_long + without_targets`, where `added` are those that came of splitting. `used` are
    the kept rows that this split has: weights and a held-out fraction may leave some to nobody or to the other
    split. Everything after it counts used rows only.
    """
    report = {
        "train": _split_report(rows.train, rows.validation),
        "validation": _split_report(rows.validation, None),
    }
    if layout.packs is not None:
        packs = layout.packs
        report["packing"] = {"packs": len(packs), "pack_length": packs.capacity, "fill": round(packs.fill, 4)}
    return report


def _split_report(split: TokenizedDataset, held_out: TokenizedDataset | None) -> dict[str, Any]:
    sources = []
    for index, source in enumerate(split.sources):
        facts = {"source": source.section.place, "format": source.store.format}
        numbers = _numbers(split.of_source(index), held_out)
        sources.append({**facts, **source.store.counts.to_json(), **numbers, "content": source.content})
    return {**split.counts.to_json(), **_numbers(split, held_out), "sources": sources}


def _numbers(split: TokenizedDataset, held_out: TokenizedDataset | None) -> dict[str, Any]:
    """Of the used rows; `tokens` and `target_tokens` replace those of all kept ones."""
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
    if held_out is not None:
        numbers["in_validation"] = int(np.isin(digests, held_out.column("digests")).sum())
    return numbers


def _spread(lengths: np.ndarray) -> dict[str, int]:
    """Shortest, longest and what lies between, in tokens."""
    if not len(lengths):
        return {}
    between = {f"p{share}": int(np.percentile(lengths, share, method="higher")) for share in PERCENTILES}
    return {"shortest": int(lengths.min()), **between, "longest": int(lengths.max())}

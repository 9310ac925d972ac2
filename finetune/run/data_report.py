"""`data_report.json` in a run directory, of this version and of earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Required

from typing_extensions import TypedDict

from finetune.formatting import counted
from finetune.storage.records import Count, Number, read_record, with_other_keys


@with_other_keys
class RecordedNote(TypedDict):
    """A note on rows."""

    count: Count
    where: str


_Earlier = TypedDict("_Earlier", {"untrainable": Count}, total=False)  # noqa: UP013
"""Keys of earlier versions."""


@with_other_keys
class SourceReport(_Earlier, total=False):
    """The rows of one source."""

    source: Required[str]
    format: str
    read: Count
    added: Count
    truncated: Count
    used: Count
    tokens: Count
    target_tokens: Count
    cut_target_tokens: Count
    duplicates: Count
    in_validation: Count
    prompts_in_validation: Count
    too_long: Count
    bad: dict[str, Count]
    lengths: dict[str, Count]
    notes: dict[str, RecordedNote]


@with_other_keys
class SplitReport(TypedDict, total=False):
    """The rows of all sources of a split."""

    used: Count
    sources: list[SourceReport]


@with_other_keys
class PackingReport(TypedDict):
    """The packs of a run."""

    packs: Count
    pack_length: Count
    fill: Number


@with_other_keys
class DataReport(TypedDict, total=False):
    """The content of `data_report.json`."""

    train: SplitReport
    validation: SplitReport
    packing: PackingReport


def read_data_report(file: Path) -> DataReport:
    """The data report of a run, as far as it is recorded and undamaged."""
    return read_record(file, DataReport)


def bad_row_counts(report: Mapping[str, Any]) -> dict[str, int]:
    """The rows of a data report that could not be used, by reason.

    Up to version 0.1 there was one reason, whose key was `untrainable`.
    """
    earlier = {"without target tokens": report["untrainable"]} if report.get("untrainable") else {}
    return dict(report.get("bad", earlier))


def dropped_rows(report: Mapping[str, Any]) -> dict[str, int]:
    """The dropped rows of a data report, or of a source in one, by reason."""
    too_long = {"too long": report["too_long"]} if report.get("too_long") else {}
    return {**too_long, **bad_row_counts(report)}


def notes_of(report: Mapping[str, Any], shown: Callable[[str], str] = str) -> list[str]:
    """The notes on the rows of all sources of a data report, each once.

    Args:
        report: The report.
        shown: The form in which places are shown.

    Returns:
        For each source and note, the text, the number of rows and the place of the first.
    """
    sources = [source for split in ("train", "validation") for source in report.get(split, {}).get("sources", [])]
    notes = [(text, note) for source in sources for text, note in source.get("notes", {}).items()]
    return list(
        dict.fromkeys(
            f"{text}: {counted(note['count'], 'row')} (first: {shown(note['where'])})" for text, note in notes
        )
    )

"""`data_report.json` in a run directory, of this version and of earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from finetune.formatting import counted


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

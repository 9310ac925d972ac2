"""`data_report.json` in a run directory, of this version and of earlier ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def bad_row_counts(report: Mapping[str, Any]) -> dict[str, int]:
    """The rows of a data report that could not be used, by reason.

    Up to version 0.1 there was one reason, whose key was `untrainable`.
    """
    earlier = {"without target tokens": report["untrainable"]} if report.get("untrainable") else {}
    return dict(report.get("bad", earlier))

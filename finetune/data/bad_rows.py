"""Rows that cannot be used: the reasons, and the error where a recipe does not drop them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from finetune.errors import DataError

# Reasons, in messages and in the data report.
REJECTED = "rejected by the chat template"
OMITTED = "omitted by the chat template"
WITHOUT_TARGETS = "without target tokens"
EMPTY = "empty answer"
CONTROL = "control tokens"
MALFORMED = "malformed"

SHOWN_PLACES = 5
"""Number of places of dropped rows that are kept for messages."""


@dataclass(frozen=True)
class BadRows:
    """The rows that cannot be used for one reason.

    Attributes:
        what: What is wrong with the first one.
        hint: The fix.
        places: `file:line` of the first ones.
    """

    what: str
    hint: str | None
    places: list[str]

    def __add__(self, later: BadRows) -> BadRows:
        """The rows of both; this one's come first."""
        return BadRows(self.what, self.hint, (self.places + later.places)[:SHOWN_PLACES])


def merged(first: Mapping[str, BadRows], second: Mapping[str, BadRows]) -> dict[str, BadRows]:
    """The rows of both, by reason."""
    both = dict(first)
    for reason, rows in second.items():
        both[reason] = both[reason] + rows if reason in both else rows
    return both


def bad_rows_error(counts: Mapping[str, int], bad: Mapping[str, BadRows], may_drop: bool) -> DataError:
    """The error about bad rows: what is wrong with the first one, and how many are like it.

    Args:
        counts: Number of bad rows by reason, at least one.
        bad: The same rows.
        may_drop: Whether dropping them would help.
    """
    reason, count = next(iter(counts.items()))
    first = bad[reason]
    what = first.what
    if count > 1:
        what += f"; {count} rows are bad for this reason ({reason}): {listed(first.places, count)}"
    for other in list(counts)[1:]:
        what += f"; {counts[other]} for another ({other}): {listed(bad[other].places, counts[other])}"
    hint = first.hint or "correct the row"
    return DataError(what, where=first.places[0], hint=f"{hint}; or set data.on_bad_row to drop" if may_drop else hint)


def listed(places: list[str], count: int) -> str:
    """The first places, for messages."""
    return ", ".join(places) + (", ..." if count > len(places) else "")

"""Rows that cannot be used: the reasons, and the error where a recipe does not drop them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune.errors import DataError
from finetune.formatting import counted

# Reasons, in messages (`3 rows ...`) and in the data report.
REJECTED = "rejected by the chat template"
OMITTED = "partly omitted by the chat template"
WITHOUT_TARGETS = "without target tokens"
EMPTY = "with an empty answer"
CONTROL = "with control tokens"
BEGINS_WITH_ANSWER = "with an answer that no message asks for"
MARKED = "with an answer marked as bad"
MALFORMED = "of another form than the format"

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
    first = bad[next(iter(counts))]
    file = first.places[0].rpartition(":")[0]
    alike = [
        f"{counted(count, 'row')} {reason} ({listed(bad[reason].places, count, file)})"
        for reason, count in counts.items()
    ]
    what = "; ".join([first.what, *alike]) if sum(counts.values()) > 1 else first.what
    hint = first.hint or "correct the row"
    return DataError(what, where=first.places[0], hint=f"{hint}; or set data.on_bad_row to drop" if may_drop else hint)


def listed(places: Sequence[str], count: int, known: str = "") -> str:
    """The first of `count` places, for messages; lines of one file together, without its name where it is known."""
    more = ", ..." if count > len(places) else ""
    file, _, _ = places[0].rpartition(":")
    lines = [place.removeprefix(f"{file}:") for place in places]
    if not file or not all(line.isdigit() for line in lines):
        return ", ".join(places) + more
    name = "" if file == known else f"{file}, "
    return f"{name}line{'s' if len(lines) > 1 else ''} {', '.join(lines)}{more}"

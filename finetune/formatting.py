"""Human-readable texts, counts, sizes and durations, the same in terminals, HTML reports and logs."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from typing import Any

SHOWN_PATTERNS = 4
"""Patterns of names in a sentence; reports have all of them."""

# C0 without tab and line feed, DEL and C1: they control a terminal. Marks, embeddings, overrides and isolates of
# direction: they show text in another order than it has. Line and paragraph separators. Surrogates are no characters.
_HIDDEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def visible(text: str) -> str:
    r"""Text of others, to be shown: control, bidirectional and line-separator characters as escapes such as `\x1b`."""
    return _HIDDEN.sub(lambda found: _escape(found.group()), text)


def json_line(value: object) -> str:
    """A value as JSON on one line, with the characters that `visible` escapes as escapes of JSON."""
    return _HIDDEN.sub(lambda found: f"\\u{ord(found.group()):04x}", json.dumps(value, ensure_ascii=False))


def in_html(text: str) -> str:
    """Text of others in HTML: `visible`, with HTML's own characters escaped."""
    return html.escape(visible(text))


def in_markdown(text: str) -> str:
    """Text of others on one line of Markdown: `visible`, with the characters escaped that make markup."""
    # An underscore within a word is none in CommonMark: names such as my_run stay readable.
    return re.sub(r"[\\`*\[\]<>#|~$&]|(?<![^\W_])_|_(?![^\W_])|^[-+]", r"\\\g<0>", visible(" ".join(text.split())))


def _escape(character: str) -> str:
    return f"\\x{ord(character):02x}" if ord(character) < 0x100 else f"\\u{ord(character):04x}"


def count(number: float) -> str:
    """4884480 -> `4.88M`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:  # three significant digits round up to the next unit from here on
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def counted(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def memory(size_bytes: float) -> str:
    """Bytes of memory in GB of 10^9 bytes."""
    return f"{size_bytes / 1e9:.1f} GB"


def size(size_bytes: int) -> str:
    """Bytes of a file in MB of 10^6 bytes."""
    return f"{size_bytes / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """95 -> `1:35`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def value(tried: object) -> str:
    """A value of a recipe; floats with four significant digits."""
    return f"{tried:.4g}" if isinstance(tried, float) else str(tried)


def engine_prompts(report: Mapping[str, Any], by: bool = False) -> str:
    """In how many prompts an engine has the tokens of the training, and the first prompt with others.

    Args:
        report: The engine's entry in a verification report.
        by: Whether to say how its tokens were found.
    """
    same, first = report["prompts"] - report["differing"], report["first"]
    found = f"{report['engine']}: {same} of {counted(report['prompts'], 'prompt')} have the tokens of the training"
    found += f" (by {report['by']})" if by else ""
    if first is None:
        return f"{found}."
    return (
        f"{found}. The first with others is {json.dumps(first['prompt'], ensure_ascii=False)}: token "
        f"{first['position']} is {first['engine'] or 'missing'}, in training {first['trained'] or 'missing'}."
    )


def unbuilt(report: Mapping[str, Any]) -> str:
    """A report on the tensors of a base that its class does not build, as a sentence.

    Args:
        report: Class, number of tensors, bytes, patterns of names, and whether they are carried over.
    """
    patterns, number = report["names"], report["tensors"]
    shown = ", ".join(patterns[:SHOWN_PATTERNS])
    if len(patterns) > SHOWN_PATTERNS:
        shown += f" and {len(patterns) - SHOWN_PATTERNS} more"
    done = "copied bit for bit, and not trained with the rest" if report["carried"] else "left out"
    subject, verb = ("1 tensor", "is") if number == 1 else (f"{number} tensors", "are")
    return (
        f"{subject} of the base that {report['class']} does not build ({shown}; {size(report['bytes'])}) {verb} {done}"
    )

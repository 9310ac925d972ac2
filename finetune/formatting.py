"""Numbers in words, the same on a terminal, on a page and in a log."""

from __future__ import annotations


def count(number: float) -> str:
    """4884480 -> `4.88M`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:  # from here on three digits round up to it
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def memory(size_bytes: float) -> str:
    """Bytes in GB, as memory is sold: 10^9."""
    return f"{size_bytes / 1e9:.1f} GB"


def size(size_bytes: int) -> str:
    """Bytes of a file in MB."""
    return f"{size_bytes / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """95 -> `1:35`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def value(tried: object) -> str:
    """A value of a recipe, a number with as many digits as tell it from others."""
    return f"{tried:.4g}" if isinstance(tried, float) else str(tried)

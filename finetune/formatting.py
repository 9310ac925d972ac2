"""Human-readable counts, sizes and durations, the same in terminals, HTML reports and logs."""

from __future__ import annotations


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

"""Names of modules and weights, as recipes write them: endings at a dot, and the nearest one to a misspelling."""

from __future__ import annotations

from collections.abc import Iterable

from finetune.recipe.error_messages import nearest

SHOWN = 12
"""Names that a hint lists at most."""


def ends_with(name: str, ending: str) -> bool:
    """Whether a full name has this ending, at a dot."""
    return name == ending or name.endswith(f".{ending}")


def endings(names: Iterable[str]) -> list[str]:
    """The last parts of full names, each once, sorted; a number together with the part before it."""
    return sorted({_ending(name) for name in names})


def shown(names: Iterable[str]) -> str:
    """The endings of names as a list in words, cut after `SHOWN`."""
    known = endings(names)
    return ", ".join(known[:SHOWN]) + (", ..." if len(known) > SHOWN else "")


def nearest_ending(wanted: str, names: Iterable[str], pattern: str = "{}") -> str:
    """A hint: the ending that `wanted` probably means, and all of them.

    Args:
        wanted: A name that matches nothing, possibly with wildcards or further parts around it.
        names: Full names.
        pattern: How the recipe writes an ending, such as `*.{}`.
    """
    names = list(names)
    known = endings(names)
    parts = [part for part in wanted.split(".") if part.strip("*?[]0123456789")]
    near = next((found for part in [*reversed(parts), wanted] if (found := nearest(part, known))), None)
    return (f"did you mean {pattern.format(near)}? " if near else "") + f"names end in: {shown(names)}"


def _ending(name: str) -> str:
    before, _, last = name.rpartition(".")
    return f"{before.rpartition('.')[2]}.{last}" if last.isdigit() and before else last

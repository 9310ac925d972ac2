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


def nearest_ending(wanted: str, names: Iterable[str]) -> str:
    """A hint: the ending that a name of nothing probably means, and all of them."""
    names = list(names)
    known = endings(names)
    near = next((found for part in [*reversed(_words(wanted)), wanted] if (found := nearest(part, known))), None)
    return (f"did you mean {near}? " if near else "") + f"names end in: {shown(names)}"


def nearest_part(pattern: str, names: Iterable[str]) -> str:
    """A hint: the part of names that an unknown part of a pattern probably means, and how names look."""
    names = list(names)
    known = {part for name in names for part in name.split(".")}
    unknown = [part for part in _words(pattern) if part not in known]
    near = next((found for part in unknown if (found := nearest(part, known))), None)
    longest = max(names, key=lambda name: name.count("."), default="")
    return (f"did you mean {near}? " if near else "") + f"names look like {longest}; * stands for any part"


def _words(pattern: str) -> list[str]:
    """The parts of a name or pattern that are more than numbers and wildcards, without these around them."""
    return [word for part in pattern.split(".") if (word := part.strip("*?[]0123456789"))]


def _ending(name: str) -> str:
    before, _, last = name.rpartition(".")
    return f"{before.rpartition('.')[2]}.{last}" if last.isdigit() and before else last

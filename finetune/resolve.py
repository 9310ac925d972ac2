"""From the string that a recipe section carries to the object that does the work."""

from __future__ import annotations

import importlib
from typing import Any, Protocol


class Buildable(Protocol):
    """A recipe section that names its implementation as `module:Name`."""

    implementation: str


def resolve(reference: str) -> Any:
    """Import `module:Name` and return the object.

    References stand in our schema, never in a recipe: a recipe is data and cannot name code.
    """
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def build(section: Any, *context: Any) -> Any:
    """The implementation of a section, constructed from that section and what else it is told.

    This is where heavy modules are imported: validating a recipe never gets here.
    """
    return resolve(type(section).implementation)(section, *context)

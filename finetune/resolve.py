"""Imports and constructs the implementation that a recipe section names."""

from __future__ import annotations

import importlib
from typing import Any, Protocol


class Buildable(Protocol):
    """A recipe section that names its implementation as `module:Name`."""

    implementation: str


def resolve(reference: str) -> Any:
    """Import `module:Name` and return the object.

    References are class attributes of the schema, never values of a recipe: a recipe cannot name code.
    """
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def build(section: Any, *context: Any) -> Any:
    """Construct the implementation of a section from the section and further arguments.

    Heavy modules are imported here, and not when a recipe is validated.
    """
    return resolve(type(section).implementation)(section, *context)

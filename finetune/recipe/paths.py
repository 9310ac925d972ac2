"""Paths relative to the working directory, rewritten for a recipe in another folder."""

from __future__ import annotations

import os
from pathlib import Path

from finetune.recipe.sections.section import absolute_to


def reached_from(folder: Path, path: str) -> str:
    """A path relative to the working directory, for a recipe in `folder`: relative if near, so that both can move."""
    absolute = absolute_to(path, Path.cwd())
    relative = os.path.relpath(absolute, folder)
    return absolute if relative.startswith(os.path.join(os.pardir, os.pardir)) else relative


def model_from(folder: Path, name: str) -> str:
    """A model's name for a recipe in `folder`: relative paths are rewritten, `org/name` and absolute paths stay."""
    is_file = name.startswith((".", "~")) or name.endswith(".gguf") or os.path.isdir(name)
    if "://" in name or os.path.isabs(name) or not is_file:
        return name
    path = reached_from(folder, name)
    return path if path.startswith((".", "/")) else f"./{path}"

"""Where a run came from: versions, machine, and the identity of its inputs."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from finetune import __version__

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "tokenizers", "pydantic")


def provenance(recipe_text: str, data_files: Iterable[Path], facts: dict[str, Any]) -> dict[str, Any]:
    """The record that stands in `provenance.json`.

    Args:
        recipe_text: The resolved recipe.
        data_files: Every file that rows were read from.
        facts: What only the caller knows: the base model, its fingerprint, devices.
    """
    return {
        "ft": __version__,
        "recipe_sha256": hashlib.sha256(recipe_text.encode()).hexdigest(),
        "data": [{"file": file.name, "bytes": file.stat().st_size, "sha256": file_digest(file)} for file in data_files],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        **facts,
    }


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

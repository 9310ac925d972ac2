"""Tensors of a base that its class does not build, such as heads for multi-token prediction and vision towers.

They take no part in training. Written models have them as they are in the base's files, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.errors import RefusedError
from finetune.models.loading.layerwise import StreamedModel
from finetune.models.loading.model_files import ModelFolder
from finetune.models.safetensors_io import StoredTensor, file_writer, shard_names, write_index
from finetune.models.weight_files import weight_files
from finetune.quantizers.choice import Quantizers
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.quantization import NoQuantization


@dataclass(frozen=True)
class UnbuiltTensors:
    """Stored tensors of a base that no tensor of the model is loaded from.

    Attributes:
        model_class: The class that does not build them.
        tensors: By name.
        groups: Patterns of their names, which match no other tensor of the base.
    """

    model_class: str
    tensors: Mapping[str, StoredTensor]
    groups: list[str]

    @classmethod
    def of(cls, folder: ModelFolder, section: Model) -> UnbuiltTensors:
        """Find those of a base; reads headers and config.

        Args:
            folder: The base's files.
            section: The recipe's section, for the attention kernel.
        """
        streamed = StreamedModel(folder, section, Quantizers(NoQuantization()), torch.device("cpu"), dequantized=False)
        built = {file for source in streamed.sources.values() for file in source.files}
        unbuilt = {name: stored for name, stored in streamed.files.items() if name not in built}
        return cls(type(streamed.model).__name__, unbuilt, _groups(unbuilt, built))

    def report(self, carried: bool) -> dict[str, Any] | None:
        """Facts for reports; None if every tensor is built.

        Args:
            carried: Whether the written model has them.
        """
        if not self.tensors:
            return None
        return {
            "class": self.model_class,
            "tensors": len(self.tensors),
            "bytes": sum(stored.bytes for stored in self.tensors.values()),
            "names": self.groups,
            "carried": carried,
        }

    def append_to(self, folder: Path) -> None:
        """Add them to a written model, as one more file of weights."""
        files = weight_files(folder)
        own = files.tensors()
        added = {name: stored for name, stored in self.tensors.items() if name not in own}
        if not added:
            return
        *names, last = shard_names(len(files.files) + 1)
        aside = folder / f"{last}.new"
        try:
            with file_writer(aside, added):
                pass  # all are copied
            aside.rename(folder / last)
        finally:
            aside.unlink(missing_ok=True)
        renamed = dict(zip((file.name for file in files.files), names, strict=True))
        for before, after in renamed.items():
            (folder / before).rename(folder / after)
        file_of = {name: renamed[stored.file.name] for name, stored in own.items()} | dict.fromkeys(added, last)
        write_index(folder, file_of, sum(stored.bytes for stored in (*own.values(), *added.values())))

    def check_carried(self, folder: Path) -> None:
        """Check that a written model has them bit for bit.

        Raises:
            RefusedError: One is missing or differs.
        """
        written = weight_files(folder).tensors()
        for name, stored in self.tensors.items():
            if name not in written or not stored.equals(written[name]):
                raise RefusedError(
                    f"the tensor {name} is not written as it is in the base",
                    where=str(folder),
                    hint="check that no other program changes the base, and try again",
                )


def _groups(names: Iterable[str], built: Iterable[str]) -> list[str]:
    """Patterns for names: their shortest beginnings that no built tensor shares, with block numbers as `*`."""
    taken = {part for name in built for part in _beginnings(name)}
    groups: dict[str, None] = {}
    for name in names:
        first = next((part for part in _beginnings(name) if part not in taken), name)
        *outer, last = first.split(".")
        pattern = ".".join([*("*" if part.isdigit() else part for part in outer), last])
        groups[pattern if first == name else f"{pattern}.*"] = None
    return sorted(groups, key=lambda pattern: re.sub(r"\d+", lambda found: found[0].zfill(6), pattern))


def _beginnings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]

"""`ft_adapter.json`: what trained weights are, and what they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from torch import nn

from finetune.errors import RefusedError, UsageError
from finetune.jobs.setup import Workbench
from finetune.models.fingerprint import fingerprint, fingerprint_quantized
from finetune.recipe.adapter import Adapter
from finetune.recipe.modules import ModuleRule
from finetune.recipe.quantization import Quantization
from finetune.recipe.section import Section
from finetune.run.directory import write_json

NAME = "ft_adapter.json"


class BaseRecord(Section):
    """A base model: its name in the recipe, its commit on the hub, and the fingerprint of its files."""

    name: str
    commit: str | None
    fingerprint: str


class QuantizedRecord(Section):
    """The base as it was quantized: a fingerprint of the layers' tensors, and the kind of device they were made on."""

    device: str
    fingerprint: str


class TrainedRecord(Section):
    """What stands beside trained weights.

    Attributes:
        adapter: The recipe's section of the method.
        convention: The formula that the tensors belong to.
        quantization: How the base was stored.
        modules: What differed for single layers.
        base: What it was trained on.
        quantized_base: The same as stored; None where no layer was quantized.
        in_conversation: Whether rows went through the chat template, so that prompts will too.
    """

    format: Literal[1] = 1
    adapter: Adapter
    convention: str
    quantization: Quantization
    modules: list[ModuleRule]
    base: BaseRecord
    quantized_base: QuantizedRecord | None
    in_conversation: bool

    @classmethod
    def of(cls, bench: Workbench, model: nn.Module, in_conversation: bool) -> TrainedRecord:
        """The record of `model`, which was trained in this process."""
        recipe = bench.recipe
        return cls(
            adapter=recipe.adapter,
            convention=bench.method.convention,
            quantization=recipe.quantization,
            modules=recipe.modules,
            base=base_record(bench),
            quantized_base=_quantized_record(bench, model),
            in_conversation=in_conversation,
        )

    def write(self, folder: Path) -> None:
        """Put the record beside the weights in `folder`."""
        write_json(folder / NAME, self.model_dump(mode="json"))

    @classmethod
    def read(cls, folder: Path, bench: Workbench) -> TrainedRecord:
        """The record in `folder`, checked against the base's files and the method.

        Raises:
            UsageError: There is none.
            RefusedError: It is not one of ours, or the base's weights or the method's formula are others now.
        """
        file = folder / NAME
        if not file.is_file():
            raise UsageError(
                "the run has no trained weights: it did not finish",
                where=str(folder.parent),
                hint="go on with it: ft train --resume RUN",
            )
        try:
            record = cls.model_validate(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, ValidationError) as error:
            raise RefusedError(
                f"{NAME} is damaged or not of this version", where=str(file), hint="train the run again"
            ) from error
        found = fingerprint(bench.folder.path)
        if found != record.base.fingerprint:
            raise RefusedError(
                f"the base's weights are not those that the run was trained on "
                f"(fingerprint {found[:12]}, trained on {record.base.fingerprint[:12]})",
                where=str(bench.folder.path),
                hint="bring back the base that the run was trained on, or train again on this one",
            )
        if record.convention != bench.method.convention:
            raise RefusedError(
                f"the weights belong to {record.convention}, this version computes {bench.method.convention}",
                where=str(file),
                hint="train the run again",
            )
        return record

    def refuse_other_quantization(self, bench: Workbench, base: nn.Module) -> None:
        """The loaded base must be quantized to the very tensors that the adapter was trained on.

        Another kind of device may round a tie the other way, so only the same kind is held to it.

        Raises:
            RefusedError: It is not.
        """
        found, known = _quantized_record(bench, base), self.quantized_base
        if found == known or (found and known and found.device != known.device):
            return
        raise RefusedError(
            "the base is quantized to other weights than those that the run was trained on",
            where=str(bench.folder.path),
            hint="use the versions of ft and of the libraries that provenance.json names, or train again",
        )


def base_record(bench: Workbench) -> BaseRecord:
    """The base of a recipe."""
    folder = bench.folder
    return BaseRecord(name=folder.name, commit=folder.commit, fingerprint=fingerprint(folder.path))


def _quantized_record(bench: Workbench, model: nn.Module) -> QuantizedRecord | None:
    found = fingerprint_quantized(model)
    return None if found is None else QuantizedRecord(device=bench.accelerator.device.type, fingerprint=found)

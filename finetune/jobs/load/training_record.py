"""`ft_adapter.json`: the record of trained weights, with their method, weight format and base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, Field, ValidationError
from torch import nn

from finetune.adapters.base import AdapterMethod
from finetune.adapters.peft_bridge import NATIVE_WEIGHTS, STOCK_WEIGHTS
from finetune.errors import RefusedError
from finetune.jobs.load.base_record import BaseRecord
from finetune.jobs.load.context import ModelSetup, TrainingContext
from finetune.models.fingerprint import fingerprint_quantized
from finetune.models.loading.load import KeptTokenizer
from finetune.models.loading.model_files import ModelFolder
from finetune.models.weight_files import weight_files
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.adapter import Adapter
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.modules import ModuleRule
from finetune.recipe.sections.quantization import Quantization
from finetune.recipe.sections.section import Section
from finetune.recipe.sections.training import Precision
from finetune.run.checkpoints import Checkpoint
from finetune.run.directory import TRAINED_RECORD, RunDirectory
from finetune.storage.files import write_json
from finetune.storage.opening import read_json
from finetune.train.checkpoint import OPTIMIZER, TRAINED


class QuantizedRecord(Section):
    """The quantized base: a fingerprint of the layers' tensors, and the type of device that quantized them."""

    device: str
    fingerprint: str


class TrainingRecord(Section):
    """Record in the folder of trained weights.

    Attributes:
        adapter: The recipe's section `adapter`.
        weight_format: The formula that the tensors are parameters of, with its version; `convention` on disk.
        quantization: The recipe's section `quantization`.
        modules: The recipe's rules for single layers.
        model: The recipe's section `model`.
        precision: The recipe's `training.precision`.
        base: The base.
        quantized_base: The quantized base; None if no layer was quantized.
        uses_chat_template: Whether rows were rendered by the chat template; prompts then are too.
        today: The date that the chat template wrote; None where it writes none.
        answer_ends: Ids of the tokens that end trained answers, most frequent first.
    """

    format: Literal[1] = 1
    adapter: Adapter
    weight_format: str = Field(
        validation_alias=AliasChoices("convention", "weight_format"), serialization_alias="convention"
    )
    quantization: Quantization
    modules: list[ModuleRule]
    model: Model
    precision: Precision
    base: BaseRecord
    quantized_base: QuantizedRecord | None
    uses_chat_template: bool = Field(validation_alias=AliasChoices("uses_chat_template", "in_conversation"))
    today: date | None = None
    answer_ends: list[int] = Field([])

    @classmethod
    def of(
        cls,
        context: TrainingContext,
        base: BaseRecord,
        quantized_base: str | None,
        uses_chat_template: bool,
        answer_ends: Sequence[int] = (),
    ) -> TrainingRecord:
        """The record of a run of this process.

        Args:
            context: Of the run.
            base: The base as it was loaded; its files may have changed since.
            quantized_base: Fingerprint of the quantized base; None if no layer was quantized.
            uses_chat_template: Whether rows were rendered by the chat template.
            answer_ends: Ids of the tokens that end trained answers.
        """
        recipe = context.recipe
        return cls(
            adapter=recipe.adapter,
            weight_format=context.method.weight_format,
            quantization=recipe.quantization,
            modules=recipe.modules,
            model=recipe.model,
            precision=recipe.training.precision,
            base=base,
            quantized_base=as_record(context, quantized_base),
            uses_chat_template=uses_chat_template,
            today=context.kept_date,
            answer_ends=list(answer_ends),
        )

    @property
    def named_tokens(self) -> list[str]:
        """Tokens that were added or trained by name."""
        return [*self.model.new_texts, *self.adapter.named_tokens]

    def write(self, folder: Path) -> None:
        """Write the record to the folder of the weights."""
        write_json(folder / TRAINED_RECORD, self.model_dump(mode="json", by_alias=True))

    @classmethod
    def read(cls, folder: Path) -> TrainingRecord:
        """Read the record of a folder.

        Raises:
            UsageError: The folder has none.
            RefusedError: It is damaged or of another version.
        """
        file = folder / TRAINED_RECORD
        if not file.is_file():
            raise RunDirectory(folder.parent).unfinished()
        try:
            return cls.model_validate(read_json(file))
        except (ValueError, ValidationError) as error:
            raise RefusedError(
                f"{TRAINED_RECORD} is damaged or not of this version", where=str(file), hint="train the run again"
            ) from error

    def kept(self, weights: Path) -> KeptTokenizer:
        """The tokenizer in the folder of the weights, and the date of the training."""
        return KeptTokenizer.of(weights, self.today)

    def refuse_others(self, weights: Path, base: ModelFolder, method: AdapterMethod, was_sharded: bool = False) -> None:
        """Check that the base's files and the method's weight format are those of the training.

        Args:
            weights: The record's folder.
            base: The base to attach the weights to.
            method: The method to load them with.
            was_sharded: See `BaseRecord.refuse_other`.

        Raises:
            RefusedError: One of them differs.
        """
        self.base.refuse_other(base, was_sharded)
        if self.weight_format != method.weight_format:
            raise RefusedError(
                f"the weights have format {self.weight_format}, this version reads {method.weight_format}",
                where=str(weights / TRAINED_RECORD),
                hint="train the run again",
            )

    def refuse_other_tokens(self, weights: Path, recipe: Recipe) -> None:
        """Check that a recipe trains rows of the same tokens, in the same order: an adapter has rows without names.

        Raises:
            RefusedError: It adds or names others.
        """
        by_name = "adapter.tokens" if recipe.adapter.method == "trainable_tokens" else "adapter.trainable_tokens"
        pairs = {
            "model.new_tokens": (self.model.new_texts, recipe.model.new_texts),
            by_name: (self.adapter.named_tokens, recipe.adapter.named_tokens),
        }
        for key, (trained, named) in pairs.items():
            if trained != named:
                raise RefusedError(
                    f"the adapter has rows for the tokens {trained}, this recipe names {named}",
                    where=str(weights),
                    hint=f"set {key} to those of that run, in their order: {json.dumps(trained, ensure_ascii=False)}",
                )

    def refuse_other_quantization(self, setup: ModelSetup, base: nn.Module) -> None:
        """See `check_same_quantized_weights`."""
        check_same_quantized_weights(self.quantized_base, setup, base)


def check_same_quantized_weights(known: QuantizedRecord | None, setup: ModelSetup, base: nn.Module) -> None:
    """Check that the loaded base's quantized tensors are bitwise those of the training.

    Raises:
        RefusedError: They are not, on the same type of device.
    """
    refuse_other_record(known, as_record(setup, fingerprint_quantized(base)), setup)


def refuse_other_record(known: QuantizedRecord | None, found: QuantizedRecord | None, setup: ModelSetup) -> None:
    """The same check for a record that exists already."""
    # Another type of device may round ties in another direction, so only the same type is compared.
    if found == known or (found and known and found.device != known.device):
        return
    raise RefusedError(
        "the base is quantized to other weights than those that the run was trained on",
        where=str(setup.folder.path),
        hint="use the versions of ft and of the libraries that provenance.json names, or train again",
    )


def trained_files(weights: Path) -> list[Path]:
    """The files with tensors in a folder of trained weights: of a full model, of an adapter, or of a checkpoint."""
    if (weights / "config.json").is_file():
        return list(weight_files(weights).files)
    names = (STOCK_WEIGHTS, NATIVE_WEIGHTS, TRAINED, OPTIMIZER)
    return [weights / name for name in names if (weights / name).is_file()]


def as_record(setup: ModelSetup, fingerprint: str | None) -> QuantizedRecord | None:
    """The record of a base with this fingerprint, quantized on the device of `setup`; None without a fingerprint."""
    if fingerprint is None:
        return None
    return QuantizedRecord(device=setup.accelerator.device.type, fingerprint=fingerprint)


def recorded_chat_template(record: Mapping[str, Any]) -> Any:
    """Whether training used the chat template, by a JSON record; None if it has no such key.

    Version 0.1 wrote the key as `in_conversation`.
    """
    return record.get("uses_chat_template", record.get("in_conversation"))


def facts_for_prompts(record: TrainingRecord) -> dict[str, Any]:
    """The facts of a record, as JSON, with which a model written from a run is asked as the run was trained."""
    facts = record.model_dump(mode="json", include={"uses_chat_template", "answer_ends", "today"})
    return {**facts, "named_tokens": record.named_tokens}


def recorded_date(record: Mapping[str, Any]) -> date | None:
    """The date that the chat template wrote in training, by a JSON record; None if it wrote none."""
    try:
        return date.fromisoformat(record.get("today") or "")
    except (TypeError, ValueError):
        return None


def recorded_tokens(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The tokens that were added or trained by name, by a JSON record; none for runs that recorded none."""
    tokens = record.get("named_tokens")
    return tuple(token for token in tokens if isinstance(token, str)) if isinstance(tokens, list) else ()


def recorded_ends(record: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids of the tokens that end trained answers, by a JSON record; none for runs that recorded none."""
    ends = record.get("answer_ends")
    return tuple(end for end in ends if isinstance(end, int)) if isinstance(ends, list) else ()


def kept_with_checkpoint(checkpoint: Checkpoint) -> KeptTokenizer:
    """The tokenizer of the run that a checkpoint lies in, and the date of the checkpoint."""
    run = RunDirectory(checkpoint.path.parent.parent)
    today = recorded_date(checkpoint.facts)
    return KeptTokenizer.of(run.tokenizer, today) if run.marker.is_file() else KeptTokenizer(today=today)

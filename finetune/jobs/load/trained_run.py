"""A finished run: its recipe, its base, which must be unchanged, and its trained weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from finetune.errors import UsageError
from finetune.jobs.load.context import TrainingContext
from finetune.jobs.load.training_record import TrainingRecord, as_record, refuse_other_record
from finetune.models.fingerprint import fingerprint_layers
from finetune.models.loading.layerwise import StreamedModel
from finetune.models.loading.model_files import ModelFolder
from finetune.recipe.load import load_recipe
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.model import Dtype
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler, Phase


def in_dtype(recipe: Recipe, dtype: Dtype | None) -> Recipe:
    """A recipe whose weights have a dtype and compute in it; unchanged without one."""
    if dtype is None:
        return recipe
    model = recipe.model.model_copy(update={"dtype": dtype})
    return recipe.model_copy(
        update={"model": model, "training": recipe.training.model_copy(update={"precision": dtype})}
    )


@dataclass(frozen=True)
class FineTunedRun:
    """A run with trained weights.

    Attributes:
        run: Its directory.
        context: Context of its recipe.
        weights: Folder of its trained weights.
        record: Record in that folder.
    """

    run: RunDirectory
    context: TrainingContext
    weights: Path
    record: TrainingRecord

    @classmethod
    def open(
        cls,
        run: RunDirectory,
        on_event: EventHandler,
        dtype: Dtype | None = None,
        check: Callable[[TrainingContext], object] | None = None,
    ) -> FineTunedRun:
        """Open a run and check that its base is unchanged.

        Args:
            run: Its directory.
            on_event: Receives a `Phase`.
            dtype: To compute in, in place of the type of the training.
            check: Called before any file of weights is read; raises if the caller has no use for the run.

        Raises:
            UsageError: The run has no trained weights.
            RefusedError: The base's weights have changed.
        """
        if not run.recipe.is_file():
            raise UsageError("the run never started", where=str(run.path), hint="train it: ft train")
        recipe = in_dtype(load_recipe(run.recipe).recipe, dtype)
        weights = run.trained(recipe.adapter.trains_base)
        if not weights.is_dir():
            raise run.unfinished()
        record = TrainingRecord.read(weights)
        context = TrainingContext.of(recipe, on_event, kept=record.kept(weights))
        if check is not None:
            check(context)
        record.refuse_others(weights, context.folder, context.method, recipe.distributed.strategy == "fsdp")
        return cls(run, context, weights, record)

    def load_base(self, on_event: EventHandler, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Load the base, and check that its quantized weights are those of the training.

        Args:
            on_event: Receives a `Phase`.
            dtype: Weight and compute dtype, in place of the recipe's.

        Raises:
            RefusedError: The quantized weights differ.
        """
        base = self.context.load_base(on_event, dtype)
        self.record.refuse_other_quantization(self.context, base)
        return base

    def stream_base(self, on_event: EventHandler, dequantized: bool) -> StreamedModel:
        """The base in float32, with weights that are read from its files when a layer needs them.

        Args:
            on_event: Receives a `Phase`.
            dequantized: Whether layers have dequantized weights, for a merge, or stay quantized as in training.

        Raises:
            RefusedError: The quantized weights differ from those of the training.
        """
        context = self.context
        if context.recipe.adapter.trains_base:  # the trained weights are a whole model
            folder = ModelFolder(self.weights, context.folder.name)
        else:
            folder = context.base_folder(on_event)
        base = StreamedModel(folder, context.section, context.quantizers, context.accelerator.device, dequantized)
        if base.quantizers:
            on_event(Phase("comparing the quantized base with that of the training"))
            found = fingerprint_layers(base.quantized_layers())
            refuse_other_record(self.record.quantized_base, as_record(context, found), context)
        return base

    def attach(self, base: PreTrainedModel, on_event: EventHandler) -> nn.Module:
        """Attach the trained weights to a newly loaded base."""
        on_event(Phase(f"loading the trained weights of {self.run.path.name}"))
        return self.context.method.load(base, self.weights)

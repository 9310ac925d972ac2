"""A finished run, opened again: its recipe, its base if it still is the same, and its trained weights."""

from __future__ import annotations

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
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler, Phase


@dataclass(frozen=True)
class FineTunedRun:
    """A run whose weights can be loaded.

    Attributes:
        run: Its directory.
        context: The parts of its recipe.
        weights: The folder of its trained weights.
        record: What stands beside them.
    """

    run: RunDirectory
    context: TrainingContext
    weights: Path
    record: TrainingRecord

    @classmethod
    def open(cls, run: RunDirectory, on_event: EventHandler) -> FineTunedRun:
        """Open a run and make sure that its base is the one that it was trained on.

        Raises:
            UsageError: The run has no trained weights.
            RefusedError: The base's weights are others now.
        """
        if not run.recipe.is_file():
            raise UsageError("the run never started", where=str(run.path), hint="train it: ft train")
        recipe = load_recipe(run.recipe).recipe
        weights = run.trained(recipe.adapter.trains_base)
        if not weights.is_dir():
            raise UsageError(
                "the run has no trained weights: it did not finish",
                where=str(run.path),
                hint="resume it: ft train --resume RUN",
            )
        context = TrainingContext.of(recipe, on_event)
        record = TrainingRecord.read(weights)
        record.refuse_others(weights, context.folder, context.method)
        return cls(run, context, weights, record)

    def load_base(self, on_event: EventHandler, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The base, quantized to the very weights that the run was trained on.

        Args:
            on_event: Told that it is loading.
            dtype: Store and compute in this type instead of the recipe's.

        Raises:
            RefusedError: It is quantized to others.
        """
        base = self.context.load_base(on_event, dtype)
        self.record.refuse_other_quantization(self.context, base)
        return base

    def stream_base(self, on_event: EventHandler, dequantized: bool) -> StreamedModel:
        """The base in float32 without its weights, which are read when they are needed.

        Args:
            on_event: Told what is checked.
            dequantized: Whether the adapter is to be folded into weights, and not put on the codes that it trained on.

        Raises:
            RefusedError: It is quantized to others than those that were trained on.
        """
        context = self.context
        if context.recipe.adapter.trains_base:  # the trained weights are a whole model
            folder = ModelFolder(self.weights, context.folder.name)
        else:
            folder = context.base_folder(on_event)
        base = StreamedModel(folder, context.section, context.quantizers, context.accelerator.device, dequantized)
        if base.quantizers:
            on_event(Phase("comparing the quantized base with the one that was trained on"))
            found = fingerprint_layers(base.quantized_layers())
            refuse_other_record(self.record.quantized_base, as_record(context, found), context)
        return base

    def attach(self, base: PreTrainedModel, on_event: EventHandler) -> nn.Module:
        """Put the trained weights on a freshly loaded base."""
        on_event(Phase(f"loading the trained weights of {self.run.path.name}"))
        return self.context.method.load(base, self.weights)

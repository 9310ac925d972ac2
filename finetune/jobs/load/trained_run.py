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
from finetune.run.events import Phase, Report


@dataclass(frozen=True)
class FineTunedRun:
    """A run whose weights can be loaded.

    Attributes:
        run: Its directory.
        bench: The parts of its recipe.
        weights: The folder of its trained weights.
        record: What stands beside them.
    """

    run: RunDirectory
    bench: TrainingContext
    weights: Path
    record: TrainingRecord

    @classmethod
    def open(cls, run: RunDirectory, report: Report) -> FineTunedRun:
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
                hint="go on with it: ft train --resume RUN",
            )
        bench = TrainingContext.of(recipe, report)
        record = TrainingRecord.read(weights)
        record.refuse_others(weights, bench.folder, bench.method)
        return cls(run, bench, weights, record)

    def load_base(self, report: Report, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The base, quantized to the very weights that the run was trained on.

        Args:
            report: Told that it is loading.
            dtype: Store and compute in this type instead of the recipe's.

        Raises:
            RefusedError: It is quantized to others.
        """
        base = self.bench.load_base(report, dtype)
        self.record.refuse_other_quantization(self.bench, base)
        return base

    def stream_base(self, report: Report, dequantized: bool) -> StreamedModel:
        """The base in float32 without its weights, which are read when they are needed.

        Args:
            report: Told what is checked.
            dequantized: Whether the adapter is to be folded into weights, and not put on the codes that it trained on.

        Raises:
            RefusedError: It is quantized to others than those that were trained on.
        """
        bench = self.bench
        if bench.recipe.adapter.trains_base:  # the trained weights are a whole model
            folder = ModelFolder(self.weights, bench.folder.name)
        else:
            folder = bench.base_folder(report)
        base = StreamedModel(folder, bench.section, bench.quantizers, bench.accelerator.device, dequantized)
        if base.quantizers:
            report(Phase("comparing the quantized base with the one that was trained on"))
            found = fingerprint_layers(base.quantized_layers())
            refuse_other_record(self.record.quantized_base, as_record(bench, found), bench)
        return base

    def attach(self, base: PreTrainedModel, report: Report) -> nn.Module:
        """Put the trained weights on a freshly loaded base."""
        report(Phase(f"loading the trained weights of {self.run.path.name}"))
        return self.bench.method.load(base, self.weights)

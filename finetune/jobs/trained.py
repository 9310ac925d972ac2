"""A finished run, opened again: its recipe, its base if it still is the same, and its trained weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from finetune.errors import RefusedError, UsageError
from finetune.jobs.setup import Workbench
from finetune.jobs.train import ADAPTER_RECORD
from finetune.models.fingerprint import fingerprint
from finetune.recipe.load import load_recipe
from finetune.run.directory import RunDirectory
from finetune.run.events import Phase, Report


@dataclass(frozen=True)
class TrainedRun:
    """A run whose weights can be loaded.

    Attributes:
        run: Its directory.
        bench: The parts of its recipe.
        weights: The folder of its trained weights.
        in_conversation: Whether it was trained through the chat template.
    """

    run: RunDirectory
    bench: Workbench
    weights: Path
    in_conversation: bool

    @classmethod
    def open(cls, run: RunDirectory, report: Report) -> TrainedRun:
        """Open a run and make sure that its base is the one that it was trained on.

        Raises:
            UsageError: The run has no trained weights.
            RefusedError: The base's weights are others now.
        """
        if not run.recipe.is_file():
            raise UsageError("the run never started", where=str(run.path), hint="train it: ft train")
        recipe = load_recipe(run.recipe).recipe
        weights = run.trained(recipe.adapter.trains_base)
        record = weights / ADAPTER_RECORD
        if not record.is_file():
            raise UsageError(
                "the run has no trained weights: it did not finish", where=str(run.path), hint="train it again"
            )
        bench = Workbench.of(recipe, report)
        written = json.loads(record.read_text(encoding="utf-8"))
        trained_on = written["base"]["fingerprint"]
        found = fingerprint(bench.folder.path)
        if found != trained_on:
            raise RefusedError(
                f"the base's weights are not those that the run was trained on "
                f"(fingerprint {found[:12]}, trained on {trained_on[:12]})",
                where=str(bench.folder.path),
                hint=f"bring back the base that {run.path.name} was trained on, or train again on this one",
            )
        return cls(run, bench, weights, in_conversation=written["in_conversation"])

    def attach(self, base: PreTrainedModel, report: Report) -> nn.Module:
        """Put the trained weights on a freshly loaded base."""
        report(Phase(f"loading the trained weights of {self.run.path.name}"))
        return self.bench.method.load(base, self.weights)

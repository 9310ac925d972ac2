"""`ft train --smoke`: the whole path of a recipe in a minute, on a random model of two blocks and a few of its rows."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from finetune.data.sources import read_rows
from finetune.errors import UnsupportedError
from finetune.jobs.export.merge import merge
from finetune.jobs.export.peft_adapter import export_adapter
from finetune.jobs.export.prompt_tokens import export
from finetune.jobs.infer.evaluate import evaluate
from finetune.jobs.load.model_ref import resolve_model_refs
from finetune.jobs.train.run import train
from finetune.models.linear_layers import linear_layers
from finetune.models.loading.meta_model import meta_model, read_config, with_blocks
from finetune.models.loading.model_files import ModelFolder, find_model
from finetune.models.loading.tiny_model import BLOCKS, write_truncated_model
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.adapter import AdaLora
from finetune.recipe.sections.data import SourceSection
from finetune.recipe.sections.modules import ModuleRule
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler, Phase, ignore

ROWS = 16
STEPS = 4


@dataclass(frozen=True)
class Smoke:
    """What went well.

    Attributes:
        steps: That were trained.
        loss: Of the last one, in nats; of random weights, so that it says nothing of the recipe's.
        answered: Held-out rows that were answered by generation.
        written: What was made of the run: `merge` or `export`, or none of them where the method has no such form.
        difference: Of the written model's logits from the trained one's, relative; None where none was written.
        adapter: Whether the adapter was exported for engines that serve it, which not all methods allow.
        seconds: In all.
    """

    steps: int
    loss: float
    answered: int
    written: str | None
    difference: float | None
    adapter: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)


def smoke(recipe: Recipe, on_event: EventHandler = ignore) -> Smoke:
    """Train, evaluate, merge and export in a temporary folder; nothing is left of it.

    Raises:
        FinetuneError: What would stop the real run too.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ft-smoke-") as folder:
        small = truncated_recipe(recipe, Path(folder), on_event)
        run = RunDirectory.create(Path(folder) / "run")
        finished = train(small, run, on_event)
        has_rows = bool(small.data.validation or small.data.validation_fraction)
        answered = evaluate(resolve_model_refs([str(run.path)])[0], on_event=on_event).answered if has_rows else 0
        written, difference = small.adapter.standalone_by, None
        if written == "merge":
            difference = merge(run, on_event=on_event).agreement.relative_difference
        elif written == "export":
            difference = export(run, on_event=on_event).agreement.relative_difference
        return Smoke(
            steps=finished.steps,
            loss=finished.loss,
            answered=answered,
            written=written,
            difference=difference,
            adapter=_is_exported(run, Path(folder) / "adapter", on_event),
            seconds=time.perf_counter() - began,
        )


def _is_exported(run: RunDirectory, folder: Path, on_event: EventHandler) -> bool:
    try:
        export_adapter(run, folder, on_event=on_event)
    except UnsupportedError:  # engines do not serve what every method trains
        return False
    return True


def truncated_recipe(recipe: Recipe, folder: Path, on_event: EventHandler) -> Recipe:
    """The recipe on a random model of two blocks, with a few rows, a few steps, and no tracker.

    Args:
        recipe: The real one.
        folder: Where the model goes.
        on_event: Told what takes long.
    """
    original = find_model(recipe.model, lambda doing: on_event(Phase(doing)), weights=False)
    on_event(Phase(f"making a random model of {BLOCKS} blocks"))
    write_truncated_model(original, folder / "model", recipe.training.seed)
    model: dict[str, Any] = {"name": str(folder / "model"), "revision": None}
    training: dict[str, Any] = {"max_steps": STEPS, "gradient_accumulation_steps": 1}
    adapter: dict[str, Any] = {}
    if recipe.model.attention == "flash_attention_2":  # what a CPU lacks
        model["attention"] = "auto"
    if recipe.model.dtype == "float16":
        model["dtype"] = "float32"
    if recipe.training.precision == "float16":
        training["precision"] = "float32"
    if isinstance(recipe.adapter, AdaLora):  # whose phases may be longer than this
        adapter = {"initial_steps": 0, "final_steps": 1, "allocate_every": 1}
    if getattr(recipe.adapter, "continue_from", None) is not None:  # over another base
        adapter["continue_from"] = None
    changes: dict[str, dict[str, Any]] = {
        "model": model,
        "training": training,
        "adapter": adapter,
        "evaluation": {"max_rows": ROWS, "generation_rows": 2, "max_new_tokens": 8, "patience": None},
        "distributed": {"processes": 1},
        "data": {"train": _few(recipe.data.train), "validation": _few(recipe.data.validation)},
        "run": {"directory": str(folder)},
    }
    sections = {name: getattr(recipe, name).model_copy(update=update) for name, update in changes.items()}
    return recipe.model_copy(update={**sections, "modules": _rules(recipe, original), "trackers": []})


def _few(sources: Sequence[SourceSection]) -> list[SourceSection]:
    """The sources with so few rows that all of them together have about ROWS."""
    each = -(-ROWS // max(1, len(sources)))
    return [
        source.model_copy(update={"rows": sum(1 for _ in islice(read_rows(source), min(each, source.rows or each)))})
        for source in sources
    ]


def _rules(recipe: Recipe, folder: ModelFolder) -> list[ModuleRule]:
    """The rules for single layers but for those about blocks that are left out; one about no layer at all stays."""
    config = read_config(folder)
    few, all_layers = (
        linear_layers(meta_model(each, recipe.model, torch.float32)) for each in (with_blocks(config, BLOCKS), config)
    )
    return [rule for rule in recipe.modules if any(map(rule.matches, few)) or not any(map(rule.matches, all_layers))]

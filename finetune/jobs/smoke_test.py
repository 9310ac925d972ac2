"""`ft train --smoke`: a test of the full path of a recipe in a minute, on a tiny random model and a few rows."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from finetune.data.sources import read_rows
from finetune.errors import UnsupportedError
from finetune.jobs.export.merge import merge
from finetune.jobs.export.peft_adapter import export_adapter
from finetune.jobs.export.prompt_tokens import export
from finetune.jobs.infer.evaluate import EvaluationOptions, evaluate
from finetune.jobs.load.model_check import check_start_at_hand
from finetune.jobs.load.model_ref import resolve_model_refs
from finetune.jobs.train.run import train
from finetune.models.layer_names import ends_with
from finetune.models.linear_layers import linear_layers
from finetune.models.loading.meta_model import meta_model, read_config, with_blocks
from finetune.models.loading.model_files import ModelFolder, find_model
from finetune.models.loading.tiny_model import BLOCKS, write_truncated_model
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.adapter import AdaLora
from finetune.recipe.sections.data import SourceSection
from finetune.recipe.sections.modules import ModuleRule, sets_something
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler, Phase, ignore

ROWS = 16
STEPS = 4
ANSWERED = 2
"""Rows of each task of `ft eval`."""


@dataclass(frozen=True)
class Smoke:
    """The result of a smoke test.

    Attributes:
        steps: Trained steps.
        loss: Loss of the last step, in nats. The weights are random: it predicts nothing about the recipe's loss.
        answered: Validation rows that were answered by generation.
        written: `merge` or `export`; None where the method supports neither.
        difference: Relative difference of written and trained logits; None where nothing was written.
        adapter: Whether the adapter was exported for inference engines, which some methods do not support.
        seconds: Wall-clock time.
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
    """Train, evaluate, merge and export in a temporary folder, which is removed.

    Raises:
        FinetuneError: An error that would stop the real run too.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ft-smoke-") as folder:
        small = truncated_recipe(recipe, Path(folder), on_event)
        run = RunDirectory.create(Path(folder) / "run")
        finished = train(small, run, on_event)
        has_rows = bool(small.data.validation or small.data.validation_fraction)
        answered = 0
        if has_rows:
            few = EvaluationOptions(limit=ANSWERED)
            answered = evaluate(resolve_model_refs([str(run.path)])[0], few, on_event=on_event).answered
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


def smoke_model_bytes(recipe: Recipe) -> int:
    """Bytes of the random model of a smoke test."""
    folder = find_model(recipe.model, lambda doing: None, weights=False)
    few = meta_model(with_blocks(read_config(folder), BLOCKS), recipe.model, torch.float32)
    return sum(parameter.numel() * parameter.element_size() for parameter in few.parameters())


def _is_exported(run: RunDirectory, folder: Path, on_event: EventHandler) -> bool:
    try:
        export_adapter(run, folder, on_event=on_event)
    except UnsupportedError:  # inference engines do not support every method
        return False
    return True


def truncated_recipe(recipe: Recipe, folder: Path, on_event: EventHandler) -> Recipe:
    """The recipe on a random model of two blocks, with a few rows, a few steps, and no tracker.

    Args:
        recipe: The recipe to test.
        folder: Folder for the model.
        on_event: Receives a phase for each slow step.
    """
    original = find_model(recipe.model, lambda doing: on_event(Phase(doing)), weights=False)
    check_start_at_hand(recipe, original.path, starts_here=False)
    on_event(Phase(f"making a random model of {BLOCKS} blocks"))
    write_truncated_model(original, folder / "model", recipe.training.seed)
    model: dict[str, Any] = {"name": str(folder / "model"), "revision": None}
    training: dict[str, Any] = {"max_steps": STEPS, "gradient_accumulation_steps": 1, "checkpoint_every_steps": None}
    adapter: dict[str, Any] = _names(recipe, original)
    if recipe.model.attention == "flash_attention_2":  # a CPU lacks it
        model["attention"] = "auto"
    if recipe.model.dtype == "float16":
        model["dtype"] = "float32"
    if recipe.training.precision == "float16":
        training["precision"] = "float32"
    if isinstance(recipe.adapter, AdaLora):  # its phases may be longer than the smoke test
        adapter |= {"initial_steps": 0, "final_steps": 1, "allocate_every": 1}
    if getattr(recipe.adapter, "continue_from", None) is not None:  # an adapter for the shapes of the real base
        adapter["continue_from"] = None
    changes: dict[str, dict[str, Any]] = {
        "model": model,
        "training": training,
        "adapter": adapter,
        "optimizer": {"warmup_steps": None},  # as a ratio, it fits into the few steps
        "evaluation": {
            "every_steps": None,
            "max_rows": ROWS,
            "generation_rows": ANSWERED,
            "max_new_tokens": 8,
            "patience": None,
        },
        "distributed": {"processes": 1},
        "data": {"train": _few(recipe.data.train), "validation": _few(recipe.data.validation)},
        "run": {"directory": str(folder)},
    }
    sections = {name: getattr(recipe, name).model_copy(update=update) for name, update in changes.items()}
    return recipe.model_copy(update={**sections, "modules": _rules(recipe, original), "trackers": []})


def _few(sources: Sequence[SourceSection]) -> list[SourceSection]:
    """The sources, limited to about ROWS rows in total."""
    each = -(-ROWS // max(1, len(sources)))
    return [
        source.model_copy(
            update={
                "rows": sum(1 for _ in islice(read_rows(source), min(each, source.rows or source.max_rows or each))),
                "max_rows": None,
            }
        )
        for source in sources
    ]


def _rules(recipe: Recipe, folder: ModelFolder) -> list[ModuleRule]:
    """The rules for single layers, without those that match removed blocks only.

    A rule that matches no layer of the full model stays: it is an error of the recipe that the test must find.
    """
    few, full = (linear_layers(model) for model in _few_and_full(recipe, folder))
    rules = recipe.modules
    return [rule for rule in rules if sets_something(rules, rule, few) or not sets_something(rules, rule, full)]


def _names(recipe: Recipe, folder: ModelFolder) -> dict[str, list[str]]:
    """The adapter's lists of names that name removed blocks: endings of their layers and all weights instead."""
    few, full = _few_and_full(recipe, folder)
    modules = _Names(set(dict(few.named_modules())), set(dict(full.named_modules())), ends_with)
    weights = _Names(set(dict(few.named_parameters())), set(dict(full.named_parameters())), fnmatchcase)
    changes = {}
    for key in ("target_modules", "feedforward_modules", "modules_to_save", "train", "freeze"):
        names = weights if key in ("train", "freeze") else modules
        entries = getattr(recipe.adapter, key, None)
        if not isinstance(entries, list) or not any(map(names.is_removed, entries)):
            continue
        instead = {"train": "*", "freeze": None}
        kept = [instead.get(key, each.rpartition(".")[2]) if names.is_removed(each) else each for each in entries]
        changes[key] = [each for each in dict.fromkeys(kept) if each is not None]
    return changes


class _Names(NamedTuple):
    """Names in the truncated and in the full model, and how an entry of a recipe matches one."""

    few: set[str]
    full: set[str]
    matches: Callable[[str, str], bool]

    def is_removed(self, entry: str) -> bool:
        """Whether an entry matches names of removed blocks only."""
        return any(self.matches(name, entry) for name in self.full - self.few) and not any(
            self.matches(name, entry) for name in self.few
        )


def _few_and_full(recipe: Recipe, folder: ModelFolder) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The truncated and the full model without weights."""
    config = read_config(folder)
    few, full = (meta_model(each, recipe.model, torch.float32) for each in (with_blocks(config, BLOCKS), config))
    return few, full

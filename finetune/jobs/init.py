"""`ft init`: inspect a dataset and a model, and write a starter recipe."""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter

from finetune.data.inspect import (
    COUNTED_ROWS,
    DatasetSummary,
    estimated_longest_row,
    longest_row,
    summarize_source,
)
from finetune.data.readers.files import is_plain_text
from finetune.data.row_lengths import RowStatistics, measure_rows
from finetune.data.sources import files_of
from finetune.errors import DataError, UsageError
from finetune.formatting import memory
from finetune.jobs.plan.estimate import MemoryPlanner
from finetune.jobs.plan.fit_to_memory import Fitted, fit
from finetune.jobs.plan.preview import preview
from finetune.jobs.plan.prompt_form import choose_form
from finetune.jobs.plan.starter_recipe import OBJECTIVES, Facts, starter_recipe
from finetune.jobs.smoke_test import Smoke, smoke, smoke_model_bytes
from finetune.models.loading.load import load_tokenizer
from finetune.models.loading.model_files import find_model
from finetune.models.loading.positions import position_limit
from finetune.plan.gpu_specs import GpuSpec
from finetune.plan.machine import memory_bytes
from finetune.recipe.error_messages import nearest
from finetune.recipe.importing.values import is_local
from finetune.recipe.load import recipe_of
from finetune.recipe.recipe import Recipe
from finetune.recipe.schema import every_key
from finetune.recipe.sections.data import Source, SourceSection, TextSource, TokenizedSource
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.section import absolute_to
from finetune.run.events import EventHandler, Phase, Progress, ignore
from finetune.storage.files import write_file
from finetune.storage.opening import write_new

logger = logging.getLogger(__name__)

FEW_TEXTS = 20
"""Texts of fewer files are split into paragraphs, so that some of them can be validation rows."""

FEW_PROMPTS = 20
"""Different prompts below which validation rows are split off by row."""

CHECKED_ROWS = 10_000
"""Rows that are tokenized of a data set too long to be read to its end."""

SMOKE_COPIES = 3
"""Copies of its model that a smoke test has in memory at a time: trained, merged, and the logits of both."""

LONG_ROW_TOKENS = 4096
TEXT_ROW_TOKENS = 2048


def inspect_dataset(
    data: str, data_format: str = "auto", columns: Mapping[str, str] = MappingProxyType({})
) -> DatasetSummary:
    """Detect a dataset's format and size.

    Args:
        data: A file, a glob pattern, a folder, or the id of a dataset on the hub.
        data_format: The format; `auto` detects it from columns.
        columns: Column names by the format's keys for them.

    Raises:
        UsageError: The format does not exist, or it has no such key.
        DataError: The data cannot be used.
    """
    source = _source(data, data_format, columns)
    found = summarize_source(source)
    is_text = source.path is not None and all(map(is_plain_text, files_of(source)))
    if is_text and isinstance(found.source, TextSource) and found.rows < FEW_TEXTS:
        paragraphs = summarize_source(found.source.model_copy(update={"split": "paragraph"}))
        return paragraphs if paragraphs.rows >= FEW_TEXTS else found
    return found


def _source(data: str, data_format: str, columns: Mapping[str, str]) -> SourceSection:
    path = absolute_to(data, Path.cwd())
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", data) and not is_local(data)
    if not (is_hub_id or glob.has_magic(path) or os.path.exists(path)):
        raise DataError("there is no such file", where=data, hint="name a file, a folder, or org/name of the hub")
    place = {"hub": {"name": data}} if is_hub_id else {"path": path}
    formats = every_key()["data", "train", 0, "format"].choices
    if data_format not in formats:
        raise UsageError(f"there is no format {data_format!r}", hint=_one_of(data_format, formats, "formats"))
    section: SourceSection = TypeAdapter(Source).validate_python({"format": data_format, **place})
    known = section.column_keys()
    for key in columns:
        if key not in known:
            raise UsageError(f"format {data_format} has no column {key!r}", hint=_one_of(key, known, "its columns"))
    return section.model_copy(update=columns)


def _one_of(found: str, known: Sequence[str], what: str) -> str:
    """A hint: the nearest known name, or all of them."""
    near = nearest(found, known)
    return f"did you mean `{near}`?" if near else f"{what}: {', '.join(known) or 'none; add --format'}"


def likely_objective(seen: DatasetSummary) -> str:
    """The usual objective of data of this kind."""
    if seen.is_text:
        return "pretraining"
    if seen.has_tools:
        return "tools"
    if seen.format in ("qa", "multiple_choice"):
        return "qa"
    if seen.format == "classification":
        return seen.format
    if seen.answers_json:
        return "extraction"
    return "long-context" if estimated_longest_row(seen.sample) > LONG_ROW_TOKENS else "chat"


@dataclass(frozen=True)
class Starter:
    """A recipe that was written.

    Attributes:
        facts: What it was written from.
        fitted: The changes that made it fit into the memory, and its plan.
        smoke: Result of the smoke test; None where it was left out.
    """

    facts: Facts
    fitted: Fitted
    smoke: Smoke | None


def write_recipe(
    seen: DatasetSummary,
    model: str,
    objective: str,
    gpu: GpuSpec | None,
    output: Path,
    on_event: EventHandler = ignore,
    checks: bool = True,
) -> Starter:
    """Write a recipe that fits into the memory by its plan, with rows of up to `data.max_length`.

    Before it is written, all rows are tokenized as training will do it, and a smoke test trains, evaluates and merges
    a random model of two blocks.

    Args:
        seen: The dataset.
        model: Name of the base, as in `model.name`; a relative path starts at the working directory.
        objective: One of `OBJECTIVES`.
        gpu: The GPU to fit into; None for this machine.
        output: The recipe's file, which is replaced.
        on_event: Receives a `Phase` before each slow part.
        checks: Whether to tokenize the rows and to run the smoke test.

    Raises:
        UsageError: The objective does not suit the data.
        OutOfMemoryError: No change makes it fit.
        DataError: No row can be used.
        ModelError: There is no such model, or it has no chat template and none that comes with ft fits it.
        EnvironmentFault: The hub cannot be reached, or the file cannot be written.
    """
    _refuse_mismatch(seen, objective)
    facts = _facts(seen, model, objective, on_event)
    loaded = recipe_of(starter_recipe(facts, output), output)
    with tempfile.TemporaryDirectory(prefix="ft-init-") as folder:
        planner = MemoryPlanner.of(_on_longest_rows(loaded.recipe, Path(folder)), gpu, on_event)
        fitted = fit(planner, loaded)
    if checks:
        facts = _with_dropped_rows(facts, recipe_of(starter_recipe(facts, output, fitted), output).recipe, on_event)
    text = starter_recipe(facts, output, fitted)
    recipe = recipe_of(text, output).recipe
    passed = _smoke_test(recipe, on_event) if checks else None
    write_file(output, text)
    return Starter(facts, fitted, passed)


def _with_dropped_rows(facts: Facts, recipe: Recipe, on_event: EventHandler) -> Facts:
    """The facts with the rows that cannot be used, found by tokenizing all rows as training will.

    Of a data set that was not read to its end, a sample of rows is tokenized.
    """
    lenient: dict[str, Any] = {"on_bad_row": "drop", "max_dropped": 1.0}
    if not facts.seen.is_whole:
        lenient["train"] = [each.model_copy(update={"max_rows": CHECKED_ROWS}) for each in recipe.data.train]
    report = preview(recipe.model_copy(update={"data": recipe.data.model_copy(update=lenient)}), 1, on_event)
    found = report.data_report["train"]
    bad = {reason: count for reason, count in found["bad"].items() if count}
    return replace(facts, dropped=sum(bad.values()) / (found["read"] + found["added"]), dropped_reasons=bad)


def _smoke_test(recipe: Recipe, on_event: EventHandler) -> Smoke | None:
    """Run the smoke test; None where this machine's memory is too small for it."""
    needed, there = SMOKE_COPIES * smoke_model_bytes(recipe), memory_bytes()
    if there is not None and needed > there:
        logger.warning(
            "the smoke test is left out: its model of two blocks needs %s of %s; ft train --smoke runs it elsewhere",
            memory(needed),
            memory(there),
        )
        return None
    on_event(Phase("testing the recipe: training, evaluating and merging a random model of two blocks"))
    with warnings_only():  # its rows are few: remarks on them are not those of the run
        return smoke(recipe)


@contextmanager
def warnings_only() -> Iterator[None]:
    """Within the block, remarks of the package are neither shown nor recorded; errors are."""
    ours = logging.getLogger("finetune")
    level = ours.level
    ours.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ours.setLevel(level)


def _on_longest_rows(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with one step of rows that all have `data.max_length` tokens."""
    rows = recipe.training.micro_batch_size * recipe.training.gradient_accumulation_steps
    file = folder / "rows.jsonl"
    write_new(file, f"{json.dumps({'input_ids': [0] * recipe.data.max_length})}\n" * rows)
    source = TokenizedSource(format="tokenized", path=str(file))
    validation = [source] if recipe.data.validation_fraction else []
    data = {"train": [source], "validation": validation, "validation_fraction": 0.0}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})


def _refuse_mismatch(seen: DatasetSummary, objective: str) -> None:
    if objective not in OBJECTIVES:
        raise UsageError(f"there is no objective {objective!r}", hint=f"objectives: {', '.join(OBJECTIVES)}")
    if seen.is_text and objective not in ("pretraining", "long-context"):
        raise UsageError(
            f"the rows are plain text without prompts and answers, and the objective is {objective}",
            where=seen.source.place,
            hint="add --aim pretraining, or name rows with prompts and answers",
        )
    if not seen.is_text and objective == "pretraining":
        raise UsageError(
            f"the rows are of format {seen.format}, and pretraining is for plain text",
            where=seen.source.place,
            hint="add --aim chat, or a column with --format text",
        )


def _facts(seen: DatasetSummary, model: str, objective: str, on_event: EventHandler) -> Facts:
    section = Model.model_validate({"name": model}, context={"folder": Path.cwd()})
    folder = find_model(section, lambda doing: on_event(Phase(doing)), weights=False)
    on_event(Phase("inspecting the data"))
    tokenizer = load_tokenizer(folder, new_tokens=())  # tokens without a row are no error here
    form = choose_form(seen, tokenizer)
    if form is not None:
        logger.info("%s", form.why)
        form.applied_to(tokenizer)
        seen = form.in_source(seen)
    longest = longest_row(seen.sample, tokenizer)
    if isinstance(seen.source, TextSource):
        rows, wanted = None, TEXT_ROW_TOKENS
    else:
        rows = measure_rows(seen.source, COUNTED_ROWS, tokenizer, _progress(seen, on_event))
        longest = max(longest, rows.longest)
        wanted = _next_length(longest)
    return Facts(
        seen=seen,
        model=model,
        objective=objective,
        longest_row=longest,
        row_tokens=min(wanted, position_limit(folder).count or wanted),
        form=form,
        splits_prompts=rows is not None and _can_split(rows),
        has_new_tokens=tokenizer.new_rows is not None,
    )


def _progress(seen: DatasetSummary, on_event: EventHandler) -> Callable[[int], None]:
    return lambda done: on_event(Progress("measuring the rows", done, seen.rows))


def _can_split(rows: RowStatistics) -> bool:
    """Whether a twentieth of the rows is at least one prompt, and no prompt has most of them."""
    return rows.prompts >= FEW_PROMPTS and rows.prompts > rows.most_of_a_prompt


def _next_length(tokens: int) -> int:
    """The next power of two, at least 128: a margin for longer rows outside of the sample."""
    return max(128, 1 << (tokens - 1).bit_length())

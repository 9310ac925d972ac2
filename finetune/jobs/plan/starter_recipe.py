"""The recipe that `ft init` writes: the value of each key, and a comment with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import yaml

from finetune.data.inspect import DatasetSummary
from finetune.formatting import count, memory
from finetune.jobs.plan.fit_to_memory import Fitted
from finetune.jobs.plan.prompt_form import PromptForm
from finetune.recipe.paths import model_from, reached_from
from finetune.recipe.yaml.writer import commented

RANK = 16
MICRO_BATCH_SIZE = 8
BATCH_SIZE = 16
SMALL_BATCH_SIZE = 8
FEW_ROWS = 500
"""Number of rows below which the batch size is smaller, so that there are enough steps."""

MANY_ROWS = 5000
"""Number of rows from which one epoch is enough for a first run."""

VALIDATION_FRACTION = 0.05
MEASURED_LABELS = 400
"""Validation rows of a classification: an accuracy of 80 % then has a 95 % interval of 4 points on each side."""

CHECKS_AN_EPOCH = 4


@dataclass(frozen=True)
class Objective:
    """A training objective.

    Attributes:
        what: In words.
        max_new_tokens: Longest answer in `ft eval`.
    """

    what: str
    max_new_tokens: int


OBJECTIVES: Mapping[str, Objective] = {
    "chat": Objective("answers in conversations", 256),
    "classification": Objective("a label for a text", 16),
    "extraction": Objective("JSON out of a text", 256),
    "tools": Objective("calls of tools", 256),
    "qa": Objective("short answers to questions", 32),
    "pretraining": Objective("continued pre-training on plain text", 64),
    "long-context": Objective("rows of many thousand tokens", 256),
}


@dataclass(frozen=True)
class Facts:
    """Inputs of a starter recipe.

    Attributes:
        seen: The dataset.
        model: The base's name, as it was given.
        objective: One of `OBJECTIVES`.
        longest_row: Tokens of the longest row.
        row_tokens: `data.max_length`.
        form: Form of the prompts; None for rows that need no chat template.
        splits_prompts: Whether the validation rows are split off by prompt.
        has_new_tokens: Whether the tokenizer has tokens without a row in the embeddings.
        dropped: Fraction of the rows that cannot be used.
        dropped_reasons: Number of these rows by reason.
    """

    seen: DatasetSummary
    model: str
    objective: str
    longest_row: int
    row_tokens: int
    form: PromptForm | None = None
    splits_prompts: bool = False
    has_new_tokens: bool = False
    dropped: float = 0.0
    dropped_reasons: Mapping[str, int] = field(default_factory=dict)

    @property
    def validation_rows(self) -> int:
        """Number of validation rows, about; none of a single row.

        A twentieth of all rows; of classifications up to a fifth, for an accuracy of a known interval.
        """
        rows = self.seen.rows
        if rows < 2:
            return 0
        least = min(MEASURED_LABELS, rows // 5) if self.objective == "classification" else 1
        return max(1, least, round(VALIDATION_FRACTION * rows))

    @property
    def accuracy_interval(self) -> str:
        """The 95 % interval of an accuracy of 80 % on the validation rows, in words."""
        reach = NormalDist().inv_cdf(0.975) * math.sqrt(0.8 * 0.2 / self.validation_rows)
        return (
            f"an accuracy of 80 % on {self.validation_rows} rows has a 95 % interval of \u00b1 {100 * reach:.1f} points"
        )


def batch_size(rows: int) -> int:
    """Rows of an optimizer step."""
    return BATCH_SIZE if rows >= FEW_ROWS else SMALL_BATCH_SIZE


def starter_recipe(facts: Facts, file: Path, fitted: Fitted | None = None) -> str:
    """The recipe as YAML with comments; relative paths in it start at its folder.

    Args:
        facts: Inputs of the recipe.
        file: Where it will be written.
        fitted: Changes that make it fit; None for the recipe without a memory limit.
    """
    changes = fitted.changes if fitted else {}
    sections = _sections(facts, file.parent)
    for key, new in changes.items():
        section, _, name = key.partition(".")
        sections[section][name] = yaml.safe_load(new)
    written = {name: section for name, section in sections.items() if section}
    return commented(_head(facts, file, fitted), written, _remarks(facts, fitted))


def _head(facts: Facts, file: Path, fitted: Fitted | None) -> list[str]:
    seen = facts.seen
    rows = f"{seen.rows} rows" if seen.is_whole else f"{seen.rows} rows and more"
    of_all = "the longest" if seen.is_whole else f"the longest of the first {seen.rows}"
    what = OBJECTIVES[facts.objective].what
    return [
        f"{what[0].upper()}{what[1:]}: a starter recipe by ft init.",
        f"Data:    {rows} of format {seen.format}; {of_all} has {facts.longest_row} tokens",
        *([_estimated(fitted, facts.row_tokens)] if fitted else []),
        f"Command: ft train {file}",
        "Every key with its default: ft explain; tokenized rows: ft preview; memory and time: ft plan",
    ]


def _estimated(fitted: Fitted, row_tokens: int) -> str:
    plan = fitted.after
    there = f" of {memory(plan.capacity)}" if plan.capacity else ""
    return f"Memory:  {memory(plan.peak)}{there} on {plan.device} if all rows had {row_tokens} tokens; with yours less"


def _sections(facts: Facts, folder: Path) -> dict[str, dict[str, Any]]:
    return {
        "model": _model(facts, folder),
        "quantization": {},
        "adapter": {"method": "lora", "r": RANK, "alpha": 2 * RANK, "target_modules": "all-linear"},
        "data": _data(facts, folder),
        "optimizer": {"name": "adamw", "learning_rate": 2e-4, "schedule": "cosine", "warmup_ratio": 0.03},
        "training": _training(facts),
        "evaluation": _evaluation(facts),
    }


def _model(facts: Facts, folder: Path) -> dict[str, Any]:
    template = facts.form and facts.form.chat_template
    model: dict[str, Any] = {"name": model_from(folder, facts.model)}
    if template:
        model["chat_template"] = template
    if facts.has_new_tokens:
        model["new_tokens"] = []
    return model


def _data(facts: Facts, folder: Path) -> dict[str, Any]:
    seen = facts.seen
    source = {"format": seen.format, **seen.source.model_dump(exclude_defaults=True, exclude={"path", "hub"})}
    place = (
        {"path": reached_from(folder, seen.source.path)}
        if seen.source.path
        else {"hub": {"name": seen.source.hub.name if seen.source.hub else ""}}
    )
    data: dict[str, Any] = {"train": [{**place, **source}]}
    if facts.validation_rows:
        data["validation_fraction"] = max(VALIDATION_FRACTION, _rounded_up(facts.validation_rows / seen.rows))
        if facts.splits_prompts:
            data["validation_by"] = "prompt"
    data["max_length"] = facts.row_tokens
    if seen.format == "text":
        data["overlength"] = "split"
    elif facts.longest_row > facts.row_tokens:
        data["overlength"] = "truncate_prompt"
    elif not seen.is_whole:
        data["overlength"] = "drop"
    if facts.dropped:
        data["on_bad_row"] = "drop"
        data["max_dropped"] = max(0.01, _rounded_up(1.2 * facts.dropped))
    return data


def _rounded_up(share: float) -> float:
    """A share with two decimals, at least as large."""
    return math.ceil(100 * share - 1e-9) / 100


def _training(facts: Facts) -> dict[str, Any]:
    training: dict[str, Any] = {
        "epochs": 3 if facts.seen.rows < MANY_ROWS and not facts.seen.is_text else 1,
        "micro_batch_size": MICRO_BATCH_SIZE,
        "gradient_accumulation_steps": batch_size(facts.seen.rows) // MICRO_BATCH_SIZE,
    }
    if facts.seen.format == "text":
        training["batching"] = "packed"
    return training


def _evaluation(facts: Facts) -> dict[str, Any]:
    evaluation: dict[str, Any] = {}
    steps_an_epoch = facts.seen.rows // batch_size(facts.seen.rows)
    if facts.validation_rows and facts.seen.is_whole and steps_an_epoch >= 10 * CHECKS_AN_EPOCH:
        evaluation["every_steps"] = steps_an_epoch // CHECKS_AN_EPOCH
    if facts.objective == "classification" and facts.seen.labels and facts.validation_rows:
        evaluation["tasks"] = [{"name": "labels", "kind": "choose"}]
    if facts.objective == "tools":
        evaluation["turns"] = "all"
    return {**evaluation, "max_new_tokens": OBJECTIVES[facts.objective].max_new_tokens}


def _remarks(facts: Facts, fitted: Fitted | None) -> dict[str, str]:
    remarks = {
        "adapter.r": "rank of the update: more learns more, and takes more",
        "data.validation_fraction": "validation rows, for the loss while training and for ft eval",
        "data.max_length": "tokens; a longer row stops the run, unless overlength says otherwise",
        "optimizer.learning_rate": "the first thing to vary: half and double of it",
        "training.gradient_accumulation_steps": f"makes {batch_size(facts.seen.rows)} rows an optimizer step",
        "training.batching": "rows are packed into max_length tokens, without attention between them",
        "evaluation.max_new_tokens": "longest answer in ft eval",
        "evaluation.turns": "every answer of a dialogue is scored, calls of tools on the way too",
        "evaluation.every_steps": f"about {CHECKS_AN_EPOCH} times an epoch",
    }
    if fitted is not None:
        plan = fitted.after
        size = count(plan.total - plan.trainable)
        remarks["model.name"] = f"{size} parameters"
        remarks |= {key: why for key, why in _reasons(size).items() if key in fitted.changes}
    if "quantization.kind" in remarks:
        remarks["quantization"] = remarks.pop("quantization.kind")
    if facts.seen.format == "text":
        remarks["data.max_length"] = "tokens; longer texts become several rows, each token is a target once"
    elif facts.longest_row > facts.row_tokens:
        remarks["data.overlength"] = "some rows are longer than the model's context: their prompt's beginning is cut"
    remarks |= _remarks_on_rows(facts)
    if facts.form is not None and (facts.form.chat_template or facts.form.source):
        remarks["model.chat_template" if facts.form.chat_template else "data.train"] = facts.form.why
    if any(isinstance(label, int) for label in facts.seen.labels):
        remarks["data.train"] = "labels are numbers in the file: name them in `labels`, the model generates names"
    return remarks


def _remarks_on_rows(facts: Facts) -> dict[str, str]:
    """Remarks on what the rows need."""
    remarks = {
        "data.validation_by": "all rows of a prompt are on one side: no validation prompt is trained",
        "evaluation.tasks": "accuracy on the validation rows: the label of the highest likelihood",
        "model.new_tokens": "the tokenizer has tokens without embeddings: they get rows, which train",
    }
    if facts.objective == "classification" and facts.validation_rows:
        remarks["data.validation_fraction"] = facts.accuracy_interval
    if not facts.seen.is_whole:
        remarks["data.overlength"] = f"only the first {facts.seen.rows} rows were measured"
    if facts.dropped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in facts.dropped_reasons.items())
        remarks["data.on_bad_row"] = f"rows that cannot be used: {reasons}"
    return remarks


def _reasons(size: str) -> dict[str, str]:
    """Why a key differs from the recipe without a memory limit."""
    return {
        "quantization.kind": f"The base in 4 bits: {size} parameters in 16 or 32 bits would not fit.",
        "adapter.r": f"rank of the update: {RANK} would not fit",
        "optimizer.name": "moments in 8 bits",
        "training.gradient_checkpointing": "recomputes activations in backward: less memory, more time",
        "evaluation.batch_size": "validation rows at a time: more would not fit",
    }

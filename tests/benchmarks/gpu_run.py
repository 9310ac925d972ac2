"""What `make bench-gpu` runs in processes of their own: models with random weights are written, and trained with ft."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.jobs.plan.estimate import MemoryPlanner
from finetune.jobs.train.run import train
from finetune.recipe.recipe import Recipe
from finetune.run.directory import RunDirectory
from finetune.run.events import Event, StepMetrics, TrainingStarted
from tests.benchmarks.gpu_cases import SHAPES, TINY, Case, Datasets
from tests.benchmarks.step_recorder import StepRecorder
from tests.benchmarks.trl_comparison import KINDS, RATES, in_order
from tests.fixtures.recipes import as_recipe
from tests.fixtures.tiny import tiny_tokenizer

SHARD_BYTES = 4 * 10**9

BYTE_TOKENS = 259
"""Tokens of the byte tokenizer; random rows draw from those above."""


class AllMeasured(Exception):
    """Ends a run after its last measured step, before anything is saved."""


def parameters_of(shape: str, is_tiny: bool) -> tuple[Any, dict[str, torch.Size]]:
    """The config of a shape, and the shapes of its parameters by name; tied ones come once."""
    settings = {**SHAPES[shape], **(TINY if is_tiny else {})}
    model_type = settings.pop("model_type")
    config = AutoConfig.for_model(
        model_type, **settings, max_position_embeddings=8192, bos_token_id=256, eos_token_id=257, pad_token_id=257
    )
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    return config, {name: parameter.shape for name, parameter in model.named_parameters()}


def counts_of(config: Any, shapes: dict[str, torch.Size]) -> dict[str, int]:
    """Numbers of parameters: of all, and without the input embedding, where the output head counts in any case."""
    total = sum(size.numel() for size in shapes.values())
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return {"parameters": total, "parameters_in_products": total - embedding}


def write_model(shape: str, folder: Path, device: str, is_tiny: bool) -> None:
    """Write a folder with a config, a tokenizer, and random weights in bfloat16.

    Matrices are drawn from N(0, 0.02^2) on the device, vectors are ones. The weights are written shard by shard, so
    that no more than one shard is in memory.

    Args:
        shape: Key of `SHAPES`.
        folder: Is made. `facts.json` beside the weights counts the parameters.
        device: Where numbers are drawn.
        is_tiny: Whether the sizes are those of `TINY`.
    """
    config, shapes = parameters_of(shape, is_tiny)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    _write_tokenizer(folder, config.vocab_size)
    generator = torch.Generator(device).manual_seed(0)
    shards = list(_shards(shapes))
    places = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: _drawn(shapes[name], generator) for name in names}, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(names, file))
    counts = counts_of(config, shapes)
    index = {"metadata": {"total_size": 2 * counts["parameters"]}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "facts.json").write_text(json.dumps(counts), encoding="utf-8")


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A byte tokenizer with as many tokens as the model has: rows with others are refused."""
    tiny_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["vocab"].update({f"<|{number}|>": number for number in range(BYTE_TOKENS, vocabulary)})
    file.write_text(json.dumps(content), encoding="utf-8")


def _shards(shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    """Names of parameters whose bfloat16 numbers fill a shard."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + 2 * shape.numel() > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * shape.numel()
    yield names


def _drawn(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Random bfloat16 numbers of this shape, on the CPU."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    numbers = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    return numbers.normal_(0, 0.02, generator=generator).cpu()


def write_rows(rows: Datasets, steps: int, vocabulary: int, file: Path) -> None:
    """Write random rows for so many steps, in ft's `tokenized` format.

    Args:
        rows: Lengths and batch.
        steps: Of the run; each sees other rows.
        vocabulary: Tokens are drawn below it.
        file: JSONL.
    """
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(steps * rows.rows_per_step):
            length = min(rows.longest, max(8, round(rows.median * draw.lognormvariate(0, rows.sigma))))
            ids = [draw.randrange(BYTE_TOKENS, vocabulary) for _ in range(length)]
            prompt = round(rows.prompt * length)
            lines.write(json.dumps({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}) + "\n")


def recipe_of(task: dict[str, Any], folder: Path) -> Recipe:
    """The recipe of a case.

    Args:
        task: As `gpu.task_of` makes it.
        folder: Of the recipe's file.
    """
    case, rows = Case(**task["case"]), Datasets(**task["rows"])
    sections = {
        "model": {"name": task["model"], "kernels": case.kernels},
        **KINDS[case.kind],
        "data": {"train": [{"path": task["data"], "format": "tokenized"}], "max_length": rows.longest},
        "optimizer": {
            "name": task["optimizer"],
            "learning_rate": RATES[case.kind],
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "weight_decay": 0.0,
        },
        "training": {
            "max_steps": task["steps"],
            "precision": task["precision"],
            "micro_batch_size": rows.micro_batch,
            "gradient_accumulation_steps": rows.accumulation,
            "batching": "padding_free",
            "gradient_checkpointing": case.checkpointing,
            "checkpoint_every_steps": 10**6,
            "dry_run": False,
        },
    }
    return as_recipe(sections, folder)


def prepare(task: dict[str, Any]) -> None:
    """Write the model and the rows of a case, and the rows once more in the order in which ft takes them.

    What an earlier case has written stays.

    Args:
        task: As `gpu.task_of` makes it.
    """
    os.environ["FT_CACHE"] = task["cache"]
    case, rows, model = Case(**task["case"]), Datasets(**task["rows"]), Path(task["model"])
    if not model.is_dir():
        being_written = model.with_suffix(".part")
        write_model(case.shape, being_written, task["device"], task["is_tiny"])
        being_written.rename(model)
    if not Path(task["data"]).is_file():
        vocabulary = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        write_rows(rows, task["steps"], vocabulary, Path(task["data"]))
    if not Path(task["ordered"]).is_file():
        with TemporaryDirectory(dir=task["scratch"]) as folder:
            ordered = in_order(recipe_of(task, Path(folder)))
        Path(task["ordered"]).write_text(json.dumps(ordered.rows), encoding="utf-8")


def run_ft(task: dict[str, Any]) -> None:
    """Measure one run of ft; the results are in the file that the task names.

    Args:
        task: As `gpu.task_of` makes it.
    """
    os.environ["FT_CACHE"] = task["cache"]
    with TemporaryDirectory(dir=task["scratch"]) as name:
        folder = Path(name)
        recipe = recipe_of(task, folder)
        if task["case"]["plans"]:
            # Before the base is loaded: what the process holds now counts as libraries.
            plan = MemoryPlanner.of(recipe, None).plan(recipe, measures_time=False)
            Path(task["plan"]).write_text(json.dumps(plan.to_json()), encoding="utf-8")
        trace = Path(task["trace"]) if task["trace"] else None
        recorder = StepRecorder(task["device"], Path(task["result"]), task["steps"], trace)
        tokens = 0

        def record(event: Event) -> None:
            nonlocal tokens
            if isinstance(event, TrainingStarted):
                recorder.begin()
            elif isinstance(event, StepMetrics):
                recorder.end_step(event.tokens - tokens, event.loss)
                tokens = event.tokens
                if event.step == task["steps"]:
                    raise AllMeasured

        try:
            train(recipe, RunDirectory.create(folder / "run"), record)
        except AllMeasured:
            return

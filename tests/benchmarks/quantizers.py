"""Size, error, loss and time of each quantizer, on a base that was never quantized: `make bench-quantizers TEXT=file`.

The base is a Llama of some million parameters with a byte tokenizer, trained here from scratch in float32. Weights that
were once rounded, such as those of a GGUF file, favour the grid that they were rounded to; these favour none. Bytes
need no tokenizer from elsewhere, keep the output head, which no quantizer touches, small beside the linear layers, and
have a loss that can be compared between any two texts.

Training and validation rows are cut from one text. Each kind runs in a process of its own: quantize, measure the
validation loss, train the same LoRA on the same rows in the same order, and measure again. With `--model` a folder or
.gguf file takes the place of the base trained here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LENGTH = 128
"""Tokens of a row."""

SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8}
"""Of the base: 3.1 million weights in linear layers."""

CALIBRATED = {"calibration_rows": 128}
KINDS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "int8": {"kind": "int8"},
    "nf4": {"kind": "nf4"},
    "fp4": {"kind": "fp4"},
    **{f"affine-{bits}": {"kind": "affine", "bits": bits} for bits in (4, 3, 2)},
    **{f"hqq-{bits}": {"kind": "hqq", "bits": bits} for bits in (4, 3, 2)},
    **{f"optq-{bits}": {"kind": "optq", "bits": bits, **CALIBRATED} for bits in (4, 3, 2)},
    **{f"icq-{bits}": {"kind": "icq", "bits": bits} for bits in (4, 3, 2)},
}

COLUMNS = [
    "kind", "bits per weight", "weight error", "entropy of codes", "loss", "loss after LoRA", "s/step", "peak memory",
]  # fmt: skip


def rows_of(file: Path) -> list[str]:
    """A text cut into rows: the texts of a JSONL file, or a plain one, joined and cut at LENGTH - 2 bytes."""
    content = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        content = "\n\n".join(json.loads(line)["text"] for line in content.splitlines())
    data, step = content.encode(), LENGTH - 2
    return [data[begin : begin + step].decode(errors="ignore") for begin in range(0, len(data) - step, step)]


def write_rows(text: Path, folder: Path) -> None:
    """Every tenth row is held out; the rest trains."""
    rows = rows_of(text)
    parts = {"validation": rows[::10], "train": [row for number, row in enumerate(rows) if number % 10]}
    for name, part in parts.items():
        lines = "".join(json.dumps({"text": row}) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def recipe_of(model: str, folder: Path, quantization: dict[str, Any], steps: int, **sections: Any) -> Any:
    """The recipe of one run."""
    from tests.fixtures.recipes import as_recipe

    data = {name: [{"path": str(folder / f"{name}.jsonl"), "format": "text"}] for name in ("train", "validation")}
    return as_recipe(
        {
            "model": {"name": model},
            "quantization": quantization,
            "adapter": {"method": "lora", "r": 8, "alpha": 16},
            "data": {**data, "max_length": 2 * LENGTH},
            "optimizer": {"name": "adamw", "learning_rate": 1e-3},
            "training": {
                "max_steps": steps,
                "micro_batch_size": 8,
                "gradient_accumulation_steps": 1,
                "precision": "float32",
            },
            "evaluation": {"max_rows": 200},
            **sections,
        },
        folder,
    )


def train_base(folder: Path, steps: int) -> Path:
    """A Llama in float32, trained from scratch on the training rows."""
    from finetune.jobs.train.run import train
    from finetune.run.directory import RunDirectory
    from tests.fixtures.tiny import write_tiny_model

    write_tiny_model(folder / "untrained", **SIZES, num_key_value_heads=4, max_position_embeddings=2 * LENGTH)
    recipe = recipe_of(
        str(folder / "untrained"), folder, {"kind": "none"}, steps,
        adapter={"method": "full"},
        training={"max_steps": steps, "micro_batch_size": 16, "gradient_accumulation_steps": 1, "precision": "float32"},
    )  # fmt: skip
    run = RunDirectory.create(folder / "base")
    finished = train(recipe, run)
    print(
        f"base: {steps} steps in {finished.seconds:.0f} s, validation loss {finished.validation_loss_before:.4f} -> "
        f"{finished.validation_loss:.4f} nats a byte\n",
        flush=True,
    )
    return Path(finished.trained)


def entropy(codes: Tensor) -> float:
    """Bits per code: of its distribution over a whole weight."""
    shares = torch.bincount(codes.int()).double() / codes.numel()
    return float(-(shares * shares.clamp(min=1e-300).log2()).sum())


def layer_facts(context: Any, model: torch.nn.Module) -> dict[str, float | None]:
    """Bits, error and entropy over all quantized layers of a model, each beside its weight in the base's files."""
    from finetune.quantizers.base import is_quantized
    from finetune.quantizers.bits import unpack_bits
    from finetune.quantizers.layer import QuantizedLinear

    stored, weights, errors, entropies = 0, 0, [], []
    for name, layer in model.named_modules():
        if not is_quantized(layer):
            continue
        weight = context.folder.weight(name).float()
        errors.append(float((layer.quantizer.dequantize(layer) - weight).norm() / weight.norm()))
        weights += weight.numel()
        if isinstance(layer, QuantizedLinear):
            stored += sum(tensor.nbytes for tensor in layer.packed().values())
            entropies.append(entropy(unpack_bits(layer.weight, layer.quantizer.bits, weight.numel())))
        else:  # int8: codes as they are, and a float32 a row
            stored += weight.numel() + 4 * layer.out_features
            entropies.append(entropy(layer.weight.flatten().int() + 128))
    if not weights:
        return {"bits": 32.0, "weight_error": 0.0, "entropy": None}
    return {
        "bits": 8 * stored / weights,
        "weight_error": statistics.mean(errors),
        "entropy": statistics.mean(entropies),
    }


def measure(name: str, model: str, folder: Path, steps: int) -> None:
    """Quantize, train and measure one kind, and print a row of the table."""
    from finetune.jobs.load.context import TrainingContext
    from finetune.jobs.train.run import train
    from finetune.run.directory import RunDirectory
    from finetune.run.events import StepMetrics, ignore

    recipe = recipe_of(model, folder, KINDS[name], steps)
    context = TrainingContext.of(recipe, ignore)
    facts = layer_facts(context, context.load_base(ignore))
    ended: list[float] = []

    def note(event: object) -> None:
        if isinstance(event, StepMetrics):
            ended.append(time.perf_counter())

    finished = train(recipe, RunDirectory.create(folder / name), note)
    seconds = statistics.median(after - before for before, after in pairwise(ended))
    cells = [
        name,
        f"{facts['bits']:.3f}",
        f"{100 * facts['weight_error']:.2f} %",
        "" if facts["entropy"] is None else f"{facts['entropy']:.3f}",
        f"{finished.validation_loss_before:.4f}",
        f"{finished.validation_loss:.4f}",
        f"{seconds:.3f}",
        f"{finished.peak_memory_bytes / 1e6:.0f} MB",
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def in_own_process(arguments: Sequence[str], folder: Path) -> None:
    """Run this module again, with a cache that lasts as long as the folder, and nothing but its table shown."""
    environment = {**os.environ, "FT_CACHE": str(folder / "cache"), "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", "tests.benchmarks.quantizers", *arguments]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)


def main() -> None:
    """Each kind in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a plain text, or JSONL with a column `text`")
    parser.add_argument("--model", help="measure on this model in the place of one that is trained here")
    parser.add_argument("--base-steps", type=int, default=600, help="steps of 16 rows that train the base")
    parser.add_argument("--steps", type=int, default=200, help="steps of 8 rows that train each LoRA")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure == "base":
        train_base(arguments.folder, arguments.base_steps)
        return
    if arguments.measure:
        measure(arguments.measure, arguments.model, arguments.folder, arguments.steps)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(arguments.text, folder)
        common = [str(arguments.text), "--folder", name]
        if arguments.model is None:
            in_own_process([*common, "--measure", "base", "--base-steps", str(arguments.base_steps)], folder)
        elif arguments.model.endswith(".gguf"):
            print(
                "These weights were rounded before, to a type of GGUF. A grid like that one loses next to nothing here "
                "(affine-4 on Q4_1: both have 4 bits, a scale and a minimum for 32), so the table ranks no kinds.\n"
            )
        model = arguments.model or str(folder / "base" / "model")
        print(f"| {' | '.join(COLUMNS)} |\n|" + "---|" * len(COLUMNS), flush=True)
        for kind in arguments.kinds:
            in_own_process([*common, "--measure", kind, "--model", model, "--steps", str(arguments.steps)], folder)


if __name__ == "__main__":
    main()

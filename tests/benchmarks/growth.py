"""Growth of time and memory: of a step with context and vocabulary, of loading and merging with file size.

`make bench-growth`. The model has the shape of SmolLM2-135M with six blocks and random weights; LoRA of rank 16 trains
on every linear layer, on one row a step, in float32. Memory of a step is the process's peak less what it held when
training began; the first step pays for libraries, so that two are run and the slope between contexts is what counts.
Every line of the tables is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from yaml import safe_load

from cli.start import reexec_with_allocator

WIDTH, INNER, BLOCKS, HEADS, KEY_HEADS = 576, 1536, 6, 9, 3
RANK = 16

KEPT = 4 * (BLOCKS * (2 * WIDTH + WIDTH + 2 * WIDTH * KEY_HEADS // HEADS + WIDTH + 2 * INNER) + WIDTH + WIDTH)
"""Bytes of a token for one copy of what norms, attention, its output and gates are given, and the head's gradient."""

STEPS = [
    (49_152, 512, "false"),
    (49_152, 2048, "false"),
    (49_152, 8192, "false"),
    (49_152, 512, "selective"),
    (49_152, 2048, "selective"),
    (49_152, 8192, "selective"),
    (49_152, 512, "true"),
    (49_152, 2048, "true"),
    (49_152, 8192, "true"),
    (262_144, 512, "false"),
    (262_144, 2048, "false"),
]
"""Vocabulary, tokens of the row, and `training.gradient_checkpointing`."""

FILES = [12, 24, 48]
"""Blocks of the models that are read and written."""

ACTIONS = ["load in bfloat16", "load in nf4", "load in affine-4", "ft quantize (affine-4)", "ft merge"]


def resident(name: str) -> int:
    """Bytes that the process holds (VmRSS) or has held at most (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split(f"{name}:")[1].split()[0])


def forget_peak() -> None:
    """Let the peak begin anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def write_model(folder: Path, vocabulary: int, blocks: int, positions: int) -> None:
    """A random Llama, with a tokenizer of bytes."""
    from tests.fixtures.tiny import write_tiny_model

    write_tiny_model(
        folder,
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
    )


def measure_step(vocabulary: int, context: int, checkpointing: str, folder: Path) -> dict[str, Any]:
    """Two steps on rows of the context's length."""
    from finetune.jobs.train.run import train
    from finetune.malloc import trim_heap
    from finetune.run.directory import RunDirectory
    from finetune.run.events import StepMetrics, TrainingStarted
    from tests.fixtures.recipes import as_recipe

    write_model(folder / "model", vocabulary, BLOCKS, context)
    text = "abcdefghijklmnopqrstuvwxyz0123456789"
    rows = [(text[number:] + text * context)[: context - 2] for number in range(2)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    recipe = as_recipe(
        {
            "model": {"name": str(folder / "model")},
            "adapter": {"method": "lora", "r": RANK, "alpha": 32},
            "data": {"train": [{"path": str(folder / "rows.jsonl"), "format": "text"}], "max_length": context},
            "optimizer": {"name": "adamw", "learning_rate": 1e-4},
            "training": {
                "max_steps": 2,
                "micro_batch_size": 1,
                "gradient_accumulation_steps": 1,
                "precision": "float32",
                "batching": "padding_free",
                "gradient_checkpointing": safe_load(checkpointing),
            },
        },
        folder,
    )
    held, ended, tokens = 0, [0.0], 0

    def note(event: object) -> None:
        nonlocal held, tokens
        if isinstance(event, TrainingStarted):
            trim_heap()  # what loading has left free would be counted as held
            forget_peak()
            held = resident("VmRSS")
        if isinstance(event, TrainingStarted | StepMetrics):
            ended.append(time.perf_counter())
        if isinstance(event, StepMetrics):
            tokens = event.tokens // event.step

    train(recipe, RunDirectory.create(folder / "run"), note)
    return {"tokens": tokens, "seconds": ended[-1] - ended[-2], "memory": resident("VmHWM") - held}


def recipe_of(folder: Path, **sections: Any) -> dict[str, Any]:
    """A step of LoRA over the model of a folder."""
    (folder / "rows.jsonl").write_text(4 * (json.dumps({"text": "one row of a few bytes"}) + "\n"), encoding="utf-8")
    return {
        "model": {"name": str(folder / "model")},
        "adapter": {"method": "lora", "r": RANK, "alpha": 32},
        "data": {
            "train": [{"path": str(folder / "rows.jsonl"), "format": "text"}],
            "validation_fraction": 0.25,
            "max_length": 64,
        },
        "training": {"max_steps": 1, "precision": "float32"},
        **sections,
    }


def prepare(blocks: int, folder: Path) -> None:
    """A model of so many blocks, and a run that has trained over it."""
    from finetune.jobs.train.run import train
    from finetune.run.directory import RunDirectory
    from tests.fixtures.recipes import as_recipe, write_recipe

    write_model(folder / "model", 49_152, blocks, 512)
    train(as_recipe(recipe_of(folder), folder), RunDirectory.create(folder / "run"))
    write_recipe(recipe_of(folder, quantization={"kind": "affine"}), folder)


def measure_files(action: str, folder: Path) -> dict[str, Any]:
    """One way to read or write the model of a folder, without what libraries take."""
    import torch

    from cli.main import app
    from finetune.models.loading.load import load_model
    from finetune.models.loading.model_files import ModelFolder
    from finetune.quantizers.choice import Quantizers
    from finetune.recipe.sections.model import Model
    from tests.unit.quantizers.loading import PACKED, PLAIN

    def load() -> object:
        return load_model(
            ModelFolder(folder / "model", "model"),
            Model(name="model"),
            Quantizers(PACKED.get(action.split()[-1], PLAIN), ()),
            weight_dtype=torch.bfloat16,
            compute_dtype=torch.bfloat16,
            device=torch.device("cpu"),
        )

    def run(*arguments: object) -> None:
        if code := app([str(argument) for argument in arguments], standalone_mode=False):
            sys.exit(code)

    torch.ones(64, 64).bfloat16() @ torch.ones(64, 64).bfloat16()
    forget_peak()
    held, began = resident("VmRSS"), time.perf_counter()
    if action == "ft merge":
        run("merge", folder / "run", "--output", folder / "merged", "--quiet", "--overwrite")
    elif action.startswith("ft quantize"):
        run("quantize", folder / "recipe.yaml", "--output", folder / "codes", "--quiet", "--overwrite")
    else:
        load()
    return {"seconds": time.perf_counter() - began, "memory": resident("VmHWM") - held}


def in_own_process(*arguments: object) -> dict[str, Any]:
    """Last line of output, as JSON, of this module with these arguments."""
    command = [sys.executable, "-m", "tests.benchmarks.growth", *map(str, arguments)]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(*columns: str) -> None:
    """The head of one."""
    print(f"\n| {' | '.join(columns)} |\n|" + "---|" * len(columns), flush=True)


def row(*cells: str) -> None:
    """One line of it."""
    print(f"| {' | '.join(cells)} |", flush=True)


def print_steps() -> None:
    """The first table."""
    print(f"One copy of what backward needs, counted by hand: {KEPT / 1e3:.1f} kB a token.")
    table("vocabulary", "checkpointing", "tokens", "ms a token", "memory of a step", "more for each more token")
    before = {}
    for vocabulary, context, checkpointing in STEPS:
        with tempfile.TemporaryDirectory() as name:
            found = in_own_process("--step", vocabulary, context, checkpointing, "--folder", name)
        smaller = before.get((vocabulary, checkpointing))
        before[vocabulary, checkpointing] = found
        slope = ""
        if smaller is not None:
            more = (found["memory"] - smaller["memory"]) / (found["tokens"] - smaller["tokens"])
            slope = f"{more / 1e3:.1f} kB"
        row(
            f"{vocabulary:,}",
            checkpointing,
            f"{found['tokens']:,}",
            f"{1e3 * found['seconds'] / found['tokens']:.2f}",
            f"{found['memory'] / 1e6:,.0f} MB",
            slope,
        )


def print_files() -> None:
    """The second."""
    table("what", "file", "seconds", "memory beside libraries")
    for blocks in FILES:
        with tempfile.TemporaryDirectory() as name:
            in_own_process("--prepare", blocks, "--folder", name)
            size = sum(file.stat().st_size for file in (Path(name) / "model").glob("*.safetensors"))
            for action in ACTIONS:
                found = in_own_process("--files", action, "--folder", name)
                row(action, f"{size / 1e6:,.0f} MB", f"{found['seconds']:.1f}", f"{found['memory'] / 1e6:,.0f} MB")


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--files", choices=ACTIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    reexec_with_allocator()  # as the command does
    if arguments.folder is None:
        print_steps()
        print_files()
        return
    os.environ["FT_CACHE"] = str(arguments.folder / "cache")
    if arguments.step:
        vocabulary, context, checkpointing = arguments.step
        found = measure_step(int(vocabulary), int(context), checkpointing, arguments.folder)
    elif arguments.prepare:
        prepare(arguments.prepare, arguments.folder)
        found = {}
    else:
        found = measure_files(arguments.files, arguments.folder)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

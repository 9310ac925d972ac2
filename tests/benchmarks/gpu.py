"""Speed and memory of ft beside TRL with PEFT on one GPU: `make bench-gpu PART=n`.

    python -m tests.benchmarks.gpu --part 1 --output runs/bench-gpu
    python -m tests.benchmarks.gpu --page --output runs/bench-gpu
    python -m tests.benchmarks.gpu --part 1 2 3 --device cpu --tiny --output runs/bench-tiny

Three shapes of models with random weights made on the device, random rows, nothing from a network. Both sides load the
same folder of weights, and see the same rows in the same order in micro-batches of the same rows. Each case runs in a
process of its own with a time limit, and its results are written at once as a JSON file; after a failure the later
cases run. A part starts no case after its time is over. TRL is left out with a note where its interpreter lacks it.

Each run has warm-up steps, which are reported apart, steady steps, of which speed is the median, and one step under the
profiler. Tokens are those of rows, without padding. MFU is tokens/s times the FLOP of a token by formula over the
device's dense peak.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.plan.gpu_specs import GPU_SPECS
from tests.benchmarks.gpu_cases import PARTS, ROWS, SHAPES, STEPS, TINY, TINY_STEPS, Case, Datasets
from tests.benchmarks.gpu_page import page, table
from tests.benchmarks.gpu_processes import ROOT, ProcessFailure, call, command, last_lines
from tests.benchmarks.trl_comparison import RATES

SCHEMA = "bench-gpu/1"

OPTIMIZERS = {"lora": "adamw", "qlora": "paged_adamw_8bit", "full": "adamw"}

FLOP_PER_PARAMETER = {"lora": 4, "qlora": 4, "full": 6}
"""Of a token: forward 2, gradient by the inputs 2, gradient by the weights 2 where they train."""

FORMULA = (
    "MFU = tokens/s * F * N / peak; F = 4 for LoRA and QLoRA, 6 for full fine-tuning; "
    "N = parameters without the input embedding, with the output head for every token; "
    "attention's own matmuls are left out"
)

LEAST_SECONDS = 10.0
"""A case that has less time left is not started."""


class Part:
    """One part in progress: its clock, its options, and the files it shares between cases.

    Args:
        number: Of the part.
        options: Of the command.
        scratch: Folder for models and rows.
    """

    def __init__(self, number: int, options: argparse.Namespace, scratch: Path) -> None:
        self._number, self._options, self._scratch = number, options, scratch
        self._began = time.monotonic()
        self._why_no_trl = (
            None if has_trl(options.trl) else f"{Path(options.trl).name} has no trl: the reference is left out"
        )
        self._without_model: dict[str, str] = {}
        self._steps = TINY_STEPS if options.tiny else STEPS

    def run(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
        """Run the cases in order; each record is written before the next case starts."""
        return [self._written(case, index) for index, case in enumerate(cases, 1)]

    def _written(self, case: Case, index: int) -> dict[str, Any]:
        name = f"{self._number}-{index:02}-{case.name}"
        task = self._task(case, name)
        began = time.monotonic()
        record = {**self._description(case, name, task), **self._outcome(case, task)}
        record["seconds_of_case"] = time.monotonic() - began
        file = self._options.output / f"{name}.json"
        file.write_text(json.dumps(record, indent=1), encoding="utf-8")
        speed = record.get("tokens_per_second")
        print(
            f"{name}: {record['status']}" + (f", {speed:,.0f} tokens/s" if speed else ""), file=sys.stderr, flush=True
        )
        return record

    @property
    def _seconds_left(self) -> float:
        return self._options.budget - (time.monotonic() - self._began)

    def _task(self, case: Case, name: str) -> dict[str, Any]:
        """What the processes of a case need to know, as JSON values."""
        options, scratch = self._options, self._scratch
        is_cuda = options.device == "cuda"
        rows = ROWS[case.rows].tiny() if options.tiny else ROWS[case.rows]
        return {
            "case": asdict(case),
            "rows": asdict(rows),
            "steps": self._steps.traced,
            "device": options.device,
            "is_tiny": options.tiny,
            "precision": "bfloat16" if is_cuda else "float32",
            "optimizer": OPTIMIZERS[case.kind] if is_cuda else "adamw",  # paged memory needs CUDA
            "liger": is_cuda and case.kernels != "plain",
            "scratch": str(scratch),
            "cache": str(scratch / "cache"),
            "model": str(scratch / case.shape),
            "data": str(scratch / f"{case.shape}-{case.rows}.jsonl"),
            "ordered": str(scratch / f"{case.shape}-{case.rows}.ordered.json"),
            "log": str(scratch / f"{name}.log"),
            "result": str(scratch / f"{name}.result.json"),
            "plan": str(scratch / f"{name}.plan.json"),
            "trl_task": str(scratch / f"{name}.task.json"),
            "trace": str(options.output / "traces" / f"{name}.json.gz") if case.keeps_trace else None,
        }

    def _description(self, case: Case, name: str, task: dict[str, Any]) -> dict[str, Any]:
        """What is known before a case runs."""
        kept = ("rows", "precision", "optimizer", "device")
        return {
            "schema": SCHEMA,
            "part": self._number,
            "name": name,
            "case": asdict(case),
            "is_tiny": self._options.tiny,
            "shape": {**SHAPES[case.shape], **(TINY if self._options.tiny else {})},
            "settings": {
                **{key: task[key] for key in kept},
                **({"liger": task["liger"]} if case.side == "trl" else {}),
            },
            "steps": asdict(self._steps),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": self._options.commit,
            "formula": FORMULA,
        }

    def _outcome(self, case: Case, task: dict[str, Any]) -> dict[str, Any]:
        """Status and measurements of a case."""
        if case.side == "trl" and self._why_no_trl:
            return {"status": "left out", "reason": self._why_no_trl}
        if case.shape in self._without_model:
            return {"status": "skipped", "reason": self._without_model[case.shape]}
        if self._seconds_left < LEAST_SECONDS:
            return {"status": "skipped", "reason": f"the part's {self._options.budget:.0f} s are over"}
        log = Path(task["log"])
        try:
            if not all(Path(task[key]).exists() for key in ("model", "data", "ordered")):
                call("prepare", task, log, self._seconds_left, self._options.device)
            self._train(case, task, log)
        except ProcessFailure as failure:
            if not Path(task["model"]).is_dir():
                self._without_model[case.shape] = f"the weights of {case.shape} could not be written: {failure}"
            failed = {"status": "failed", "reason": str(failure), "error": last_lines(log)}
            return {**failed, **self._measured(case, task)}
        return {"status": "measured", **self._measured(case, task)}

    def _train(self, case: Case, task: dict[str, Any], log: Path) -> None:
        timeout = min(self._options.case_timeout, self._seconds_left)
        if case.side == "ft":
            call("run_ft", task, log, timeout, self._options.device)
        else:
            Path(task["trl_task"]).write_text(json.dumps(_trl_task(case, task)), encoding="utf-8")
            command([self._options.trl, "-m", "tests.benchmarks.trl_side", task["trl_task"]], log, timeout)

    def _measured(self, case: Case, task: dict[str, Any]) -> dict[str, Any]:
        """Everything that the case's process has written, whether or not it ended well."""
        found: dict[str, Any] = {}
        if Path(task["plan"]).is_file():
            plan = json.loads(Path(task["plan"]).read_text(encoding="utf-8"))
            found["estimated_memory"] = {"peak": plan["peak"], "parts": plan["parts"]}
        result = Path(task["result"])
        if not result.is_file():
            return found
        facts = json.loads(result.read_text(encoding="utf-8"))
        seconds, tokens = facts.pop("seconds"), facts.pop("tokens")
        warm_up, steady = self._steps.warm_up, slice(self._steps.warm_up, self._steps.warm_up + self._steps.steady)
        speeds = [count / taken for count, taken in zip(tokens[steady], seconds[steady], strict=True)]
        found |= {**facts, "tokens_of_steps": tokens, "seconds_of_steps": seconds}
        found["warm_up_seconds"] = sum(seconds[:warm_up])
        if not speeds:
            return found
        found["tokens_per_second"] = speed = statistics.median(speeds)
        found["seconds_of_steady_step"] = statistics.median(seconds[steady])
        counts = json.loads((Path(task["model"]) / "facts.json").read_text(encoding="utf-8"))
        flop = FLOP_PER_PARAMETER[case.kind] * counts["parameters_in_products"]
        peak = self._options.peak_flops or peak_flops(facts["device_name"])
        found |= {**counts, "flop_per_token": flop, "peak_flops": peak, "mfu": speed * flop / peak if peak else None}
        trace = facts["trace"]
        if trace and trace["gpu_busy_seconds"] is not None:
            # The profiler slows launches down, not kernels: beside an untraced step the share is closer to the truth.
            trace["gpu_idle_share_untraced"] = max(0.0, 1 - trace["gpu_busy_seconds"] / found["seconds_of_steady_step"])
        return found


def _trl_task(case: Case, task: dict[str, Any]) -> dict[str, Any]:
    """The settings of a case as `trl_side` reads them."""
    optimizers = {"adamw": "adamw_torch_fused" if task["device"] == "cuda" else "adamw_torch"}
    rows = Datasets(**task["rows"])
    return {
        **{key: task[key] for key in ("precision", "model", "steps", "device", "liger", "result", "trace")},
        "kind": case.kind,
        "micro": rows.micro_batch,
        "rows_per_step": rows.rows_per_step,
        "rows_file": task["ordered"],
        "learning_rate": RATES[case.kind],
        "optimizer": optimizers.get(task["optimizer"], task["optimizer"]),
        "checkpointing": bool(case.checkpointing),
        "traced_step": task["steps"],
        "folder": str(Path(task["scratch"]) / "trl"),
    }


def peak_flops(device: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device as its maker states it; None where its name is not known."""
    for card in sorted(GPU_SPECS, key=lambda card: -len(card.name)):
        if card.teraflops and card.name in device.upper().replace(" ", ""):
            return card.teraflops * 1e12
    return None


def has_trl(python: str) -> bool:
    """Whether an interpreter can import TRL and what it needs here."""
    code = "from importlib.util import find_spec as f; assert f('trl') and f('peft') and f('datasets')"
    try:
        return subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def commit() -> str | None:
    """The commit that is measured; None outside a repository."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command; by default of this process's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, nargs="+", choices=PARTS, default=[], help="parts to run")
    parser.add_argument("--page", action="store_true", help="write benchmark.md from the JSON files of --output")
    parser.add_argument("--output", type=Path, default=Path("runs/bench-gpu"), help="folder of the JSON files")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two layers, two steps: whether the benchmark runs")
    parser.add_argument("--trl", "--rival", default=sys.executable, help="interpreter with trl, peft and datasets")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds of a part")
    parser.add_argument("--case-timeout", type=float, default=150.0, help="seconds of a case, without writing weights")
    parser.add_argument("--peak-flops", type=float, help="dense bfloat16 FLOP/s; by default by the device's name")
    parser.add_argument("--scratch", type=Path, help="folder for 25 GB of weights; by default a temporary one")
    parser.add_argument("--commit", default=os.environ.get("FT_COMMIT") or commit(), help="commit that is measured")
    options = parser.parse_args(arguments)
    if not options.part and not options.page:
        parser.error("name a part, or --page")
    options.output = options.output.absolute()
    options.output.mkdir(parents=True, exist_ok=True)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run parts, or make the page; returns the exit status."""
    options = options_of(arguments)
    os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    records = []
    for number in options.part:
        scratch = Path(tempfile.mkdtemp(prefix="bench-gpu-", dir=options.scratch))
        try:
            records += Part(number, options, scratch).run(PARTS[number])
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    if options.page:
        file = options.output / "benchmark.md"
        file.write_text(page(options.output), encoding="utf-8")
        print(file)
    if records:
        print(table(records))
    return 1 if any(record["status"] == "failed" for record in records) else 0


if __name__ == "__main__":
    # So that a job that is stopped leaves neither processes nor weights behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    raise SystemExit(main())

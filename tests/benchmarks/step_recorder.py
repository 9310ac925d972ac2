"""Seconds, losses and peak memory of training steps, and a trace of one of them.

Needs PyTorch and nothing else, so that the reference trainer's environment can import it as well.
"""

from __future__ import annotations

import gzip
import json
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MARK = "benchmark step"
"""Name of the span of the traced step in the trace."""

TOP_KERNELS = 12

ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
"""Categories of trace events during which the GPU is busy."""

API_CALLS = {"cuda_runtime", "cuda_driver"}

SYNCHRONIZATIONS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"}

PACKAGES = ["torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "liger-kernel", "triton"]


def versions() -> dict[str, str]:
    """The installed packages that decide about speed, by name."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: str) -> str:
    """The name of the GPU, or `cpu`."""
    return torch.cuda.get_device_name() if device == "cuda" else device


def peak_memory(device: str) -> dict[str, int]:
    """Peak memory in bytes: of the caching allocator on a GPU, else the resident set of the process."""
    if device == "cuda":
        return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


class StepRecorder:
    """Measures the steps of a training loop that calls it after each step.

    The device is synchronized at the end of a step, so that a step's seconds contain its own kernels. The file is
    written after each step: the steps before a failure stay readable.

    Args:
        device: `cuda` or `cpu`.
        file: Receives the results as JSON; None for no file.
        traced_step: The step, from 1, that runs under the profiler; None for none.
        trace: Receives the trace itself, compressed by gzip; None keeps the summary alone.
    """

    def __init__(
        self, device: str, file: Path | None = None, traced_step: int | None = None, trace: Path | None = None
    ) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self._device, self._file, self._traced_step, self._trace_file = device, file, traced_step, trace
        self._created = self._step_began = time.perf_counter()
        self._profile = ExitStack()
        self._profiler: Any = None
        self._facts: dict[str, Any] = {
            "device_name": device_name(device),
            "versions": versions(),
            "traced_step": traced_step,
            "trace": None,
        }

    def begin(self) -> None:
        """Training begins: what was allocated so far counts as loading."""
        self._synchronize()
        self._facts["loading_seconds"] = time.perf_counter() - self._created
        self._facts["peak_memory_while_loading"] = peak_memory(self._device)
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._write()
        self._start_trace_if_due()
        self._step_began = time.perf_counter()

    def end_step(self, tokens: int, loss: float | None = None) -> None:
        """A step has ended.

        Args:
            tokens: Of the step's rows, padding not counted.
            loss: Of the step, in nats per target token; None where `note_loss` receives it later.
        """
        self._synchronize()
        self.seconds.append(time.perf_counter() - self._step_began)
        self.tokens.append(tokens)
        if loss is not None:
            self.losses.append(loss)
        self._facts["peak_memory"] = peak_memory(self._device)
        self._write()
        if self._profiler is not None:
            self._finish_trace()
        self._start_trace_if_due()
        self._step_began = time.perf_counter()

    def note_loss(self, loss: float) -> None:
        """The loss of the last step, in nats per target token."""
        self.losses.append(loss)
        self._write()

    def _synchronize(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def _start_trace_if_due(self) -> None:
        if len(self.seconds) + 1 != self._traced_step:
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device == "cuda" else [])]
        self._profiler = self._profile.enter_context(profile(activities=activities))
        self._profile.enter_context(record_function(MARK))

    def _finish_trace(self) -> None:
        self._profile.close()
        profiler, self._profiler = self._profiler, None
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(file))
            content = file.read_bytes()
        if self._trace_file is not None:
            self._trace_file.parent.mkdir(parents=True, exist_ok=True)
            self._trace_file.write_bytes(gzip.compress(content, compresslevel=5))
        summary = summarize_trace(json.loads(content)["traceEvents"])
        if self._device != "cuda":
            operators = sorted(profiler.key_averages(), key=lambda entry: -entry.self_cpu_time_total)
            summary["top_operators"] = [
                {"name": entry.key, "seconds": entry.self_cpu_time_total / 1e6, "calls": entry.count}
                for entry in operators
                if entry.key != MARK
            ][:TOP_KERNELS]
        self._facts["trace"] = summary
        self._write()

    def _write(self) -> None:
        if self._file is not None:
            facts = {**self._facts, "seconds": self.seconds, "losses": self.losses, "tokens": self.tokens}
            self._file.write_text(json.dumps(facts), encoding="utf-8")


def summarize_trace(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The traced step in numbers.

    Args:
        events: Of a trace in Chrome's format, times in microseconds; exactly one span is called `MARK`.

    Returns:
        Seconds of the step under the profiler; seconds and share of the step in which the GPU runs nothing, None where
        the trace has no GPU; the kernels that take most time; numbers of kernels, of launch calls and of
        synchronizations by API name; seconds that the CPU spends in synchronizations.
    """
    spans = [event for event in events if event.get("ph") == "X"]
    (step,) = (event for event in spans if event["name"] == MARK and event.get("cat") == "user_annotation")
    begin, end = step["ts"], step["ts"] + step["dur"]
    inside = [event for event in spans if event["ts"] < end and event["ts"] + event["dur"] > begin]
    on_device = [event for event in inside if event.get("cat") in ON_DEVICE]
    kernels = [event for event in on_device if event["cat"] == "kernel"]
    calls = [event for event in inside if event.get("cat") in API_CALLS]
    waits = [event for event in calls if event["name"] in SYNCHRONIZATIONS]
    busy = _union((max(event["ts"], begin), min(event["ts"] + event["dur"], end)) for event in on_device)
    return {
        "seconds": step["dur"] / 1e6,
        "gpu_busy_seconds": busy / 1e6 if on_device else None,
        "gpu_idle_share": 1 - busy / step["dur"] if on_device else None,
        "kernels": len(kernels),
        "kernel_launches": dict(
            Counter(event["name"] for event in calls if "Launch" in event["name"] and "HostFunc" not in event["name"])
        ),
        "synchronizations": dict(Counter(event["name"] for event in waits)),
        "synchronization_seconds": sum(event["dur"] for event in waits) / 1e6,
        "top_kernels": _top(kernels),
    }


def _union(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals: kernels of several streams overlap."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _top(kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kernels that take most time, summed by name."""
    seconds: Counter[str] = Counter()
    for event in kernels:
        seconds[event["name"]] += event["dur"] / 1e6
    calls = Counter(event["name"] for event in kernels)
    return [
        {"name": name[:160], "seconds": taken, "calls": calls[name]} for name, taken in seconds.most_common(TOP_KERNELS)
    ]

"""Pytest plugin of a worker of `python -m tests.gpu`: it selects tests, orders them, and reports each phase as a line.

The runner and its worker exchange files, whose paths are in environment variables:

- `FT_GPU_TESTS_EVENTS`: the worker appends one JSON object per line. A line is complete before the next operation
  starts, so the file is valid up to the operation that crashes or hangs.
- `FT_GPU_TESTS_SELECTION`: JSON with `remaining`, the node ids that a restarted worker runs, in their order (null for
  the first worker, which collects them), and `excluded`, node ids that do not run.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

EVENTS = "FT_GPU_TESTS_EVENTS"
SELECTION = "FT_GPU_TESTS_SELECTION"
DEVICE = "FT_GPU_TESTS_DEVICE"
"""`cpu` for a dry run; read by tests/conftest.py too."""

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "liger-kernel", "pytest")
"""Packages whose versions results.json contains."""

PRIORITY = ("test_gpu_kernels.py", "test_gpu.py")
"""Files in their order; all others follow."""

CUDA_ERROR = re.compile(
    r"CUDA error|CUDNN_STATUS|CUBLAS_STATUS|CUSOLVER_STATUS|cuDNN error|NCCL error|device-side assert|AcceleratorError"
    r"|Triton Error \[CUDA\]"
)
"""Messages after which the CUDA context of the process may be unusable."""

NO_DEVICE = 90
"""Exit code of a worker without a CUDA device."""

LONGEST_TEXT = 20_000
"""Characters of a failure's traceback; the last ones."""


class Events:
    """Appends events to the file that the runner reads."""

    def __init__(self, file: str) -> None:
        self._file = Path(file)

    def write(self, event: str, **values: Any) -> None:
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"event": event, **values}, default=str) + "\n")


def environment() -> dict[str, Any]:
    """Device and versions. Raises RuntimeError without a CUDA device, unless the dry run is on a CPU."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    if os.environ.get(DEVICE) == "cpu":
        return {"device": f"cpu ({platform.machine()})", "versions": versions}
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device")
    found = torch.cuda.get_device_properties(0)
    versions["cuda"] = str(torch.version.cuda)
    versions["cudnn"] = str(torch.backends.cudnn.version())
    name = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}"
    return {"device": f"{torch.cuda.device_count()} x {name}", "versions": versions}


def ordered(node_ids: list[str]) -> list[str]:
    """The node ids by priority of their files, with parametrizations of different tests interleaved.

    The first parametrization of every test comes first, then the second one of every test, and so on: a run that the
    budget cuts off has covered every test that has started.
    """
    seen: Counter[str] = Counter()
    keys = {}
    for number, node_id in enumerate(node_ids):
        function = node_id.partition("[")[0]
        file = Path(node_id.partition("::")[0]).name
        priority = PRIORITY.index(file) if file in PRIORITY else len(PRIORITY)
        keys[node_id] = (seen[function], priority, number)
        seen[function] += 1
    return sorted(node_ids, key=keys.__getitem__)


class Worker:
    """The hooks."""

    def __init__(self, events: Events, remaining: list[str] | None, excluded: list[str]) -> None:
        self._events = events
        self._remaining = remaining
        self._excluded = set(excluded)
        self._is_context_lost = False

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self._remaining is None:
            self._events.write("not collected", id=report.nodeid, text=report.longreprtext[-LONGEST_TEXT:])

    @pytest.hookimpl(trylast=True)  # after -m and -k have deselected
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        found = {item.nodeid: item for item in items if item.nodeid not in self._excluded}
        order = ordered(list(found)) if self._remaining is None else self._remaining
        items[:] = [found[node_id] for node_id in order if node_id in found]
        self._events.write("collected", ids=[item.nodeid for item in items])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        sys.stdout.flush()
        self._events.write("started", id=nodeid, log_bytes=os.fstat(1).st_size)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        text = report.longreprtext
        if report.skipped and isinstance(report.longrepr, tuple):
            text = report.longrepr[2].removeprefix("Skipped: ")
        self._is_context_lost |= report.failed and bool(CUDA_ERROR.search(text))
        self._events.write(
            "phase",
            id=report.nodeid,
            phase=report.when,
            outcome=report.outcome,
            seconds=report.duration,
            text=text[-LONGEST_TEXT:],
            properties=dict(report.user_properties) if report.when == "teardown" else {},
        )

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._events.write("finished", id=nodeid)
        if self._is_context_lost:
            os._exit(1)  # an orderly exit synchronizes with the device, which may hang; the runner starts a new worker


def pytest_configure(config: pytest.Config) -> None:
    events = Events(os.environ[EVENTS])
    try:
        events.write("environment", **environment())
    except RuntimeError as error:
        pytest.exit(str(error), returncode=NO_DEVICE)
    selection = json.loads(Path(os.environ[SELECTION]).read_text(encoding="utf-8"))
    config.pluginmanager.register(Worker(events, **selection), "ft-gpu-worker")

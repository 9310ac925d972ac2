"""Memory does not grow with the number of different row lengths."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune.train.memory import KERNEL_CACHES, bound_kernel_caches

MATMULS = """
import sys, torch
from finetune.malloc import trim_heap
from finetune.train.memory import bound_kernel_caches
if sys.argv[1] == "bounded":
    bound_kernel_caches()
def rss():
    trim_heap()
    return int(open("/proc/self/statm").read().split()[1]) * 4096
weight = torch.rand(256, 256).bfloat16()
for length in range(16, 616):
    if length == 316:  # the bounded caches are full
        before = rss()
    torch.rand(length, 256).bfloat16() @ weight
print(rss() - before)
"""


def test_bound_kernel_caches_keeps_values_of_user(monkeypatch: pytest.MonkeyPatch):
    first, second = KERNEL_CACHES
    monkeypatch.setenv(first, "7")
    monkeypatch.delenv(second, raising=False)
    bound_kernel_caches()
    assert os.environ[first] == "7"
    assert os.environ[second] == KERNEL_CACHES[second]
    monkeypatch.delenv(second)


@pytest.mark.skipif(
    not (sys.platform == "linux" and torch.cpu.get_capabilities().get("avx512_bf16")),
    reason="oneDNN multiplies bfloat16 here only with these instructions",
)
def test_kernel_caches_of_many_shapes_are_bounded():
    grown = {}
    for how in ("bounded", "free"):
        environment = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES}
        result = subprocess.run(
            [sys.executable, "-c", MATMULS, how],
            cwd=Path(__file__).parents[3],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        grown[how] = int(result.stdout)
    assert grown["bounded"] < 0.5 * grown["free"], grown

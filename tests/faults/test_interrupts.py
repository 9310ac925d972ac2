"""Ctrl-C in every phase of `ft train`: the first waits for a safe moment, the second exits within a second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import ROOT

PHASES = {
    "data": "finetune.jobs.load.context.read_data",
    "loading": "finetune.jobs.load.context.load_model",
    "step": "finetune.train.loop.train_step",
    "evaluation": "finetune.jobs.train.evaluator.compute_validation_loss",
    "checkpoint": "finetune.jobs.train.checkpointing.write_state",
    "saving": "finetune.jobs.train.training_loop._write_trained",
}
"""The function in which each phase spends its time."""

HANG = """
import importlib, os, sys, time
module, _, name = sys.argv.pop(1).rpartition(".")

def hang(*arguments, **settings):
    os.write(1, b"here\\n")
    time.sleep(60)

setattr(importlib.import_module(module), name, hang)
from cli.start import run
run()
"""


@pytest.mark.parametrize(
    "phase", [phase if phase in ("step", "saving") else pytest.param(phase, marks=pytest.mark.slow) for phase in PHASES]
)
def test_second_interrupt_exits_from_a_long_phase(phase: str, recipe: Path, tmp_path: Path):
    errors = tmp_path / "errors.txt"
    process = subprocess.Popen(
        [sys.executable, "-c", HANG, PHASES[phase], "train", recipe, "--run-dir", tmp_path / "run"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "FT_CACHE": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=errors.open("w"),
    )
    try:
        assert process.stdout.readline() == b"here\n", errors.read_text()
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None  # the control: one is waited for
        process.send_signal(signal.SIGINT)
        assert process.wait(1) == 130
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in errors.read_text()

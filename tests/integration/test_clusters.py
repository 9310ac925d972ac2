"""Templates for clusters, as far as they can be tested without a cluster."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
import yaml

from cli.main import app

CLUSTERS = Path(__file__).parents[2] / "recipes" / "clusters"
OPTIONS = {
    option
    for parameter in typer.main.get_command(app).commands["train"].params  # type: ignore[attr-defined]
    for option in parameter.opts
}


@pytest.mark.parametrize("file", sorted(CLUSTERS.iterdir()), ids=lambda file: file.name)
def test_cluster_template_uses_only_existing_options(file: Path):
    text = re.sub(r"(?m)^ *#.*$", "", file.read_text())  # of other programs, too
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {"--kill-on-bad-exit", "--working-dir"}
    assert {"--resume", "--processes", "--nodes", "--rendezvous"} <= said <= OPTIONS


def test_kubernetes_job_restarts_only_after_exit_code_75():
    service, job = yaml.safe_load_all((CLUSTERS / "kubernetes.yaml").read_text())
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    rules = {rule["action"]: rule.get("onExitCodes") for rule in reversed(spec["podFailurePolicy"]["rules"])}
    assert rules["Ignore"] == {"containerName": container["name"], "operator": "In", "values": [75]}
    assert 75 in rules["FailJob"]["values"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # which the policy needs
    assert spec["completions"] == spec["parallelism"] == int(container["args"][3])
    first = container["args"][-1].partition(":")[0]
    assert first == f"{job['metadata']['name']}-0.{spec['template']['spec']['subdomain']}"
    assert service["metadata"]["name"] == spec["template"]["spec"]["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}


def test_skypilot_recovers_from_exit_code_75():
    task = yaml.safe_load((CLUSTERS / "skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert subprocess.run(["bash", "-n"], input=task["run"], text=True, check=False).returncode == 0


FAKES = {
    "scontrol": 'case $1 in show) echo "${3%%,*}" ;; requeue) echo "$2" >> requeued ;; esac',
    "srun": 'shift; echo "$@" > called; exec "$@"',
    "ft": f'exec {sys.executable} -c "import os, signal, time\n'
    "signal.signal(signal.SIGTERM, lambda *_: None)\n"
    "open('ready', 'w').close()\n"
    "time.sleep(float(os.environ.get('TAKES', 0)))\n"
    "raise SystemExit(int(os.environ['CODE']))\"",
}
"""A scheduler of one machine, and an ft that leaves with $CODE after $TAKES seconds, whatever it is sent."""


@pytest.fixture
def scheduler(tmp_path: Path) -> dict[str, str]:
    """The environment of a job."""
    for name, script in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "here,there", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    return {**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


@pytest.mark.parametrize("code", [0, 1, 4, 75, 137])
def test_slurm_requeues_a_job_only_after_exit_code_75(code: int, scheduler: dict[str, str], tmp_path: Path):
    command = ["bash", str(CLUSTERS / "slurm.sh"), "recipe.yaml", "runs/mine"]
    done = subprocess.run(command, env={**scheduler, "CODE": str(code)}, cwd=tmp_path, check=False)
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == (code == 75)
    called = "ft train recipe.yaml --run-dir runs/mine --resume auto --processes 4 --nodes 2 --rendezvous here:24711\n"
    assert (tmp_path / "called").read_text() == called


def test_slurm_waits_for_a_job_that_saves_after_a_signal(scheduler: dict[str, str], tmp_path: Path):
    command = ["bash", str(CLUSTERS / "slurm.sh"), "recipe.yaml", "runs/mine"]
    job = subprocess.Popen(command, env={**scheduler, "CODE": "75", "TAKES": "2"}, cwd=tmp_path)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 75
    assert (tmp_path / "requeued").read_text() == "4711\n"

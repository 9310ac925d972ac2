"""Two machines of a run, each with its launcher: both are this one, or two of its network namespaces."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from .conftest import ROOT

pytestmark = pytest.mark.slow
PLAIN = ["--set", "adapter.dropout=0", "--set", "training.precision=float32"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Machine:
    """A launcher with one process."""

    def __init__(self, folder: Path, name: str, rendezvous: str, *arguments: object, prefix: tuple[str, ...] = ()):
        self.errors = folder / f"{name}.txt"
        self.process = subprocess.Popen(
            [
                *prefix, sys.executable, "-m", "cli", "train", *map(str, arguments), "--run-dir", folder / "run",
                "--nodes", "2", "--rendezvous", rendezvous,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.errors.open("w"),
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FT_CACHE": str(folder / "cache")},
            start_new_session=True,
        )  # fmt: skip

    def said(self) -> str:
        """Standard error."""
        return self.errors.read_text()

    def kill(self) -> None:
        """End it and what it started, at once."""
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()
            self.process.wait()


def steps(run: Path) -> list[tuple[int, float]]:
    metrics = run / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    return [(line["step"], line["loss"]) for line in lines if line["event"] == "step"]


def wait_for_step(run: Path, step: int, machines: list[Machine]) -> None:
    deadline = time.monotonic() + 120
    while len(steps(run)) < step:
        assert time.monotonic() < deadline
        for machine in machines:
            assert machine.process.poll() is None, machine.said()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """What one process makes of the recipe."""
    folder = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "-m", "cli", "train", str(recipe), *PLAIN, "--run-dir", str(folder / "run"), "-q"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FT_CACHE": str(folder / "cache")}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return steps(folder / "run")


def test_two_machines_have_the_losses_of_one_process(recipe: Path, alone: list[tuple[int, float]], tmp_path: Path):
    rendezvous = f"127.0.0.1:{free_port()}"
    machines = [Machine(tmp_path, name, rendezvous, recipe, *PLAIN) for name in ("first", "second")]
    for machine in machines:
        assert machine.process.wait(180) == 0, machine.said()
    assert len(alone) == 12
    for (step, loss), (expected_step, expected) in zip(steps(tmp_path / "run"), alone, strict=True):
        assert step == expected_step
        assert loss == pytest.approx(expected, rel=1e-5)
    assert sum(machine.said().count("saving ...") for machine in machines) == 1


def test_signal_to_one_machine_stops_both_after_the_same_step(recipe: Path, tmp_path: Path):
    rendezvous = f"127.0.0.1:{free_port()}"
    machines = [
        Machine(tmp_path, name, rendezvous, recipe, *PLAIN, "--set", "training.epochs=5000")
        for name in ("first", "second")
    ]
    wait_for_step(tmp_path / "run", 2, machines)
    machines[1].process.send_signal(signal.SIGTERM)
    codes = [machine.process.wait(60) for machine in machines]
    assert codes == [75, 75], [machine.said() for machine in machines]
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 75


@pytest.fixture
def network() -> Iterator[list[tuple[str, str]]]:
    """Two network namespaces with a cable between them: how to run a program there, and the address."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the program ip")
    names = ["ft-test-a", "ft-test-b"]
    try:
        for name in names:
            made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
            if made.returncode:
                pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
        link = [
            "ip",
            "link",
            "add",
            "ft-a",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "ft-b",
            "netns",
            names[1],
        ]
        made = subprocess.run(link, capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"no virtual cables here: {made.stderr.strip()}")
        for name, device, address in zip(names, ("ft-a", "ft-b"), ("10.99.0.1", "10.99.0.2"), strict=True):
            for command in (
                ["addr", "add", f"{address}/24", "dev", device],
                ["link", "set", device, "up"],
                ["link", "set", "lo", "up"],
            ):
                subprocess.run(["ip", "-n", name, *command], check=True)
        yield [(names[0], "10.99.0.1"), (names[1], "10.99.0.2")]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_disconnected_machine_rejoins_and_the_run_ends_as_uninterrupted(
    recipe: Path, alone: list[tuple[int, float]], network: list[tuple[str, str]], tmp_path: Path
):
    (first, address), (second, _) = network
    more = [*PLAIN, "--set", "distributed.restarts=2", "--resume", "auto"]
    rendezvous = f"{address}:29500"

    def machine(name: str) -> Machine:
        inside = ("ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={'ft-a' if name == first else 'ft-b'}")
        return Machine(tmp_path, name, rendezvous, recipe, *more, prefix=inside)

    machines = [machine(first), machine(second)]
    try:
        wait_for_step(tmp_path / "run", 3, machines)
        subprocess.run(["ip", "-n", second, "link", "set", "ft-b", "down"], check=True)
        machines[1].kill()
        time.sleep(2)
        subprocess.run(["ip", "-n", second, "link", "set", "ft-b", "up"], check=True)
        machines[1] = machine(second)
        codes = [one.process.wait(240) for one in machines]
        assert codes == [0, 0], [one.said()[-2000:] for one in machines]
    finally:
        for one in machines:
            one.kill()
    found = steps(tmp_path / "run")
    assert [step for step, _ in found] == list(range(1, 13))
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in alone], rel=1e-5)

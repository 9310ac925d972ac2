"""On a Ray cluster: `ray job submit --working-dir . -- python recipes/clusters/ray_job.py recipe.yaml /shared/run 2 4`.

One launcher per machine, placed by Ray; the launcher starts the processes of the run. Arguments: recipe, run
directory (on storage that all machines see), machines, GPUs of each. Exits as ft does, so 75 means: submit it again.
"""

from __future__ import annotations

import subprocess
import sys

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

PORT = 29500


@ray.remote
def address() -> str:
    """IP address of the machine that runs this task."""
    return ray.util.get_node_ip_address()


@ray.remote
def launcher(command: list[str]) -> int:
    """Run ft on this machine; returns its exit code."""
    return subprocess.run(command, check=False).returncode


def main() -> int:
    """Place a launcher on each machine and wait for all."""
    recipe, run, nodes, gpus = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    ray.init()
    group = placement_group([{"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}] * nodes, strategy="STRICT_SPREAD")
    ray.get(group.ready())
    places = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index) for index in range(nodes)]
    first = ray.get(address.options(num_cpus=1, scheduling_strategy=places[0]).remote())
    command = ["ft", "train", recipe, "--run-dir", run, "--resume", "auto", "--processes", str(max(1, gpus))]
    if nodes > 1:
        command += ["--nodes", str(nodes), "--rendezvous", f"{first}:{PORT}"]
    tasks = [launcher.options(num_cpus=1, num_gpus=gpus, scheduling_strategy=place).remote(command) for place in places]
    codes = ray.get(tasks)
    return next((code for code in codes if code not in (0, 75)), max(codes))


if __name__ == "__main__":
    sys.exit(main())

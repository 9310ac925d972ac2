"""The launcher of a run with several ranks, on PyTorch's elastic agent.

The agent starts the workers, runs the rendezvous of the machines, monitors, and ends all workers when one has died. The
launcher adds three things. A signal reaches every worker once, and workers have the time that saving takes. The first
error is reported once, with the message and exit code of a run in one process. No worker outlives the launcher.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from uuid import uuid4

import torch
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from finetune.errors import EnvironmentFault, FinetuneError, Interrupted, ProcessFailed, ProcessLost, UsageError
from finetune.run.directory import RunDirectory
from finetune.run.distributed import LAUNCH, LAUNCHER, RankExit, published_run_dir
from finetune.run.signals import Interruption

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class RendezvousConfig:
    """The rendezvous of the machines of a run.

    Attributes:
        nodes: Number of machines; each has its own launcher.
        host: Name or address of the machine that hosts the store.
        port: Port of the store.
    """

    nodes: int = 1
    host: str = "localhost"
    port: int = 0

    @classmethod
    def at(cls, nodes: int, rendezvous: str | None) -> RendezvousConfig:
        """As `--nodes` and `--rendezvous HOST:PORT` say.

        Raises:
            UsageError: One is given without the other, or the endpoint is malformed.
        """
        if nodes == 1:
            if rendezvous is not None:
                raise UsageError("--rendezvous is for several machines", hint="say how many: --nodes N")
            return cls()
        host, _, port = (rendezvous or "").rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            found = "is missing" if rendezvous is None else f"is {rendezvous!r}"
            raise UsageError(
                f"--nodes {nodes} needs --rendezvous HOST:PORT, which {found}",
                hint=f"name the first machine on each of them: --nodes {nodes} --rendezvous first-machine:29500",
            )
        return cls(nodes, host, int(port))

    def parameters(self) -> RendezvousParameters:
        """For PyTorch's agent; the local address is that of the interface which reaches the host."""
        if self.nodes == 1:
            address, more = "localhost", {}
        else:
            address, more = self._own_address(), {"is_host": self._is_here(), "join_timeout": 600}
        return RendezvousParameters(
            backend="c10d",
            endpoint=f"{self.host}:{self.port}",
            run_id=uuid4().hex if self.nodes == 1 else f"ft-{self.host}-{self.port}",
            min_nodes=self.nodes,
            max_nodes=self.nodes,
            local_addr=address,
            **more,
        )

    def _own_address(self) -> str:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((self.host, self.port))  # a datagram socket sends nothing here
                return str(probe.getsockname()[0])
        except OSError as error:
            raise EnvironmentFault(
                f"{self.host} cannot be reached: {error.strerror or error}", hint="see --rendezvous HOST:PORT"
            ) from error

    def _is_here(self) -> bool:
        """Whether this process hosts the store: only the machine of an address can bind it, and only once."""
        try:
            with socket.create_server((self.host, self.port)):
                return True
        except OSError:
            return False


def launch_ranks(
    command: Sequence[str],
    processes: int,
    restarts: int,
    leave: Callable[[], None],
    rendezvous: RendezvousConfig | None = None,
) -> None:
    """Run a command as the ranks of this machine; returns when all have ended without an error.

    Args:
        command: Program and arguments, the same for every rank.
        processes: Number of ranks on this machine.
        restarts: How many times all ranks restart after one has died.
        leave: Ends this process immediately; called at a second SIGINT.
        rendezvous: With other machines; by default there are none.

    Raises:
        UsageError: There are fewer GPUs.
        FinetuneError: The first error of a rank.
    """
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise UsageError(
            f"{processes} processes need a GPU each, and this machine has {torch.cuda.device_count()}",
            hint="lower --processes or distributed.processes",
        )
    logging.getLogger("torch.distributed.elastic").setLevel(
        logging.CRITICAL
    )  # errors of workers are reported by the launcher
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    with tempfile.TemporaryDirectory(prefix="ft-launch-") as folder:
        launch = _Launch(_agent(command, processes, restarts, folder, rendezvous or RendezvousConfig()), Path(folder))
        interruption = Interruption()

        def leave_all() -> None:
            launch.send(signal.SIGKILL)
            leave()

        # Without a shared store: restarted workers would find the addresses of dead ones in it.
        environment = {LAUNCHER: str(os.getpid()), LAUNCH: folder, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        os.environ |= environment
        try:
            with interruption.listening(leave_all), interruption.deferred():
                launch.watch(interruption)
        finally:
            for name in environment:
                del os.environ[name]
        if (error := launch.error(interruption)) is None:
            return
        run = published_run_dir(launch.folder)
        if run is not None and isinstance(error, ProcessFailed):
            RunDirectory(run).correct_outcome(error)
        raise error


def _agent(
    command: Sequence[str], processes: int, restarts: int, folder: str, rendezvous: RendezvousConfig
) -> LocalElasticAgent:
    parameters = rendezvous.parameters()
    spec = WorkerSpec(
        role="ft",
        local_world_size=processes,
        entrypoint=command[0],
        args=tuple(command[1:]),
        rdzv_handler=_rendezvous(parameters),
        max_restarts=restarts,
        monitor_interval=POLL_SECONDS,
        local_addr=parameters.local_addr,
    )
    return LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=folder))


def _rendezvous(parameters: RendezvousParameters) -> RendezvousHandler:
    """The rendezvous, hosted by this process or by another machine.

    Raises:
        EnvironmentFault: The endpoint does not answer.
    """
    try:
        return get_rendezvous_handler(parameters)
    except RendezvousConnectionError as error:
        if not parameters.get_as_bool("is_host"):
            raise EnvironmentFault(
                f"no rendezvous answers at {parameters.endpoint}",
                hint="start the run on the machine that --rendezvous names, at most a minute later than on this one",
            ) from error
    # Two launchers on one machine: both found the port free, and the other one bound it first.
    parameters.config["is_host"] = False
    return _rendezvous(parameters)


class _Launch:
    """An agent in its own thread, because in the main thread it would handle signals itself.

    Args:
        agent: Before its start.
        folder: Holds the error files of its workers.
    """

    def __init__(self, agent: LocalElasticAgent, folder: Path) -> None:
        self.agent, self.folder = agent, folder
        self.result: RunResult | None = None
        self.fault: Exception | None = None
        self._signalled: set[int] = set()

    def watch(self, interruption: Interruption) -> None:
        """Wait for the end of all workers; a signal is forwarded to each of them once."""
        thread = Thread(target=self._run, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            if interruption.number is not None:
                self.send(interruption.number, but_not_to=self._signalled)

    def _run(self) -> None:
        try:
            self.result = self.agent.run()
        except Exception as error:  # raised in the main thread
            self.fault = error

    def send(self, number: int, but_not_to: set[int] | None = None) -> None:
        """Send a signal to every worker but those in `but_not_to`, and add the others to it."""
        pids = {worker.id for worker in self.agent.get_worker_group().workers if isinstance(worker.id, int)}
        for pid in pids - (but_not_to or set()):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        if but_not_to is not None:
            but_not_to |= pids

    def error(self, interruption: Interruption) -> FinetuneError | None:
        """The root cause of the end of the run, or None.

        In this order: an exception of the agent; the earliest error of a rank which is no consequence of another
        rank's end; a rank that a signal killed, unless the run was asked to stop; a stop; an interruption before
        anything was saved; an exit without an error file; the end of a rank on another machine.
        """
        if self.fault is not None:
            reason = str(self.fault) or type(self.fault).__name__
            return EnvironmentFault(f"the rendezvous of the run failed: {reason}", hint="start the run again")
        exits = self._exits()
        errors = [each for each in exits if not each.is_stop and not each.is_consequence]
        if errors:
            return min(errors, key=lambda each: each.timestamp).error()
        reported = {each.rank for each in exits}
        failures = self.result.failures if self.result is not None else {}
        for rank, failure in sorted(failures.items()):
            if rank not in reported and failure.exitcode < 0 and interruption.number is None:
                name = signal.Signals(-failure.exitcode).name
                hint = "look in the system log whether memory ran out" if name == "SIGKILL" else None
                return ProcessFailed(
                    f"ended by {name}", code=128 - failure.exitcode, where=f"process {rank}", hint=hint
                )
        stops = sorted((each for each in exits if each.is_stop), key=lambda each: each.rank)
        if stops:
            return stops[0].error()  # the main rank reports what is saved
        if interruption.number is not None and failures:
            name = signal.Signals(interruption.number).name
            return Interrupted(f"by {name} before anything could be saved", number=interruption.number)
        for rank, failure in sorted(failures.items()):
            if rank not in reported:
                return ProcessFailed("ended without an error message", code=failure.exitcode, where=f"process {rank}")
        return ProcessLost("a rank on another machine has ended", hint="look at the output there") if failures else None

    def _exits(self) -> list[RankExit]:
        """Error files of the last start of the workers."""
        starts = sorted(self.folder.glob("*/attempt_*"), key=lambda path: int(path.name.rpartition("_")[2]))
        found = [RankExit.read(file) for file in starts[-1].rglob("error.json")] if starts else []
        return [each for each in found if each is not None]


def rank_command(package: str) -> list[str]:
    """The command of this process, for a launcher to start.

    `-P` keeps the working directory off the import path: a file there must not be imported as a module.
    """
    return [sys.executable, "-P", "-m", package, *sys.argv[1:]]

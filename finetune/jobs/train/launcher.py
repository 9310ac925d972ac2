"""Several processes of a run under one supervisor, on PyTorch's elastic agent.

The agent starts the processes, lets machines find each other, watches, and ends all when one has died. What it leaves
to us: a signal reaches every process once and they have the time that saving takes, the first error is told once, in
the words and with the exit code of a run in one process, and nothing outlives the supervisor.
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

LOOK_EVERY_SECONDS = 0.1


@dataclass(frozen=True)
class RendezvousConfig:
    """Where the machines of a run find each other.

    Attributes:
        nodes: How many there are; each has a supervisor of its own.
        host: Name or address of one of them, which keeps the books.
        port: There.
    """

    nodes: int = 1
    host: str = "localhost"
    port: int = 0

    @classmethod
    def at(cls, nodes: int, rendezvous: str | None) -> RendezvousConfig:
        """As `--nodes` and `--rendezvous HOST:PORT` say.

        Raises:
            UsageError: One needs the other, or the place is none.
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
        """For PyTorch's agent: this machine's own address is the one that it reaches the host from."""
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
                probe.connect((self.host, self.port))  # of a datagram socket: nothing is sent
                return str(probe.getsockname()[0])
        except OSError as error:
            raise EnvironmentFault(
                f"no way leads to {self.host}: {error.strerror or error}", hint="see --rendezvous HOST:PORT"
            ) from error

    def _is_here(self) -> bool:
        """Whether the books are kept in this process: an address can be bound only where it belongs, and once."""
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
    meeting: RendezvousConfig | None = None,
) -> None:
    """Run a command as this machine's processes of one run, and come back when all have ended well.

    Args:
        command: Program and arguments, the same for every process.
        processes: How many there are on this machine.
        restarts: How many times all start again after one has died.
        leave: Ends this process at once; called when a second SIGINT comes.
        meeting: With other machines; by default there are none.

    Raises:
        UsageError: There are fewer GPUs.
        FinetuneError: What ended the first process that ended by itself.
    """
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise UsageError(
            f"{processes} processes need a GPU each, and this machine has {torch.cuda.device_count()}",
            hint="lower --processes or distributed.processes",
        )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what ended a process, we say ourselves
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    with tempfile.TemporaryDirectory(prefix="ft-launch-") as folder:
        launch = _Launch(_agent(command, processes, restarts, folder, meeting or RendezvousConfig()), Path(folder))
        interruption = Interruption()

        def leave_all() -> None:
            launch.send(signal.SIGKILL)
            leave()

        # In a store that outlives them, processes that start again find the addresses of those that died.
        environment = {LAUNCHER: str(os.getpid()), LAUNCH: folder, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        os.environ |= environment
        try:
            with interruption.listening(leave_all):
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
    command: Sequence[str], processes: int, restarts: int, folder: str, meeting: RendezvousConfig
) -> LocalElasticAgent:
    parameters = meeting.parameters()
    spec = WorkerSpec(
        role="ft",
        local_world_size=processes,
        entrypoint=command[0],
        args=tuple(command[1:]),
        rdzv_handler=_rendezvous(parameters),
        max_restarts=restarts,
        monitor_interval=LOOK_EVERY_SECONDS,
        local_addr=parameters.local_addr,
    )
    return LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=folder))


def _rendezvous(parameters: RendezvousParameters) -> RendezvousHandler:
    """The place where machines meet, kept here or reached from here.

    Raises:
        EnvironmentFault: Nothing answers there.
    """
    try:
        return get_rendezvous_handler(parameters)
    except RendezvousConnectionError as error:
        if not parameters.get_as_bool("is_host"):
            raise EnvironmentFault(
                f"nobody keeps a rendezvous at {parameters.endpoint}",
                hint="start the run on the machine that --rendezvous names, at most a minute later than on this one",
            ) from error
    # Of two supervisors on one machine both may have found the place free; the other was first to take it.
    parameters.config["is_host"] = False
    return _rendezvous(parameters)


class _Launch:
    """An agent at work in a thread of its own: it takes signals for itself in the main one.

    Args:
        agent: Before its start.
        folder: Where its processes leave what ended them.
    """

    def __init__(self, agent: LocalElasticAgent, folder: Path) -> None:
        self.agent, self.folder = agent, folder
        self.result: RunResult | None = None
        self.fault: Exception | None = None
        self._told: set[int] = set()

    def watch(self, interruption: Interruption) -> None:
        """Wait for the end of all processes; a signal is passed on to each of them once."""
        thread = Thread(target=self._run, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(LOOK_EVERY_SECONDS)
            if interruption.number is not None:
                self.send(interruption.number, but_not_to=self._told)

    def _run(self) -> None:
        try:
            self.result = self.agent.run()
        except Exception as error:  # told in the main thread
            self.fault = error

    def send(self, number: int, but_not_to: set[int] | None = None) -> None:
        """Send a signal to every process; those that got one are added to `but_not_to`."""
        pids = {worker.id for worker in self.agent.get_worker_group().workers if isinstance(worker.id, int)}
        for pid in pids - (but_not_to or set()):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        if but_not_to is not None:
            but_not_to |= pids

    def error(self, interruption: Interruption) -> FinetuneError | None:
        """What ended the run: an error before a stop, the first before later ones, and what others died of last."""
        if self.fault is not None:
            reason = str(self.fault) or type(self.fault).__name__
            return EnvironmentFault(f"the processes of the run did not meet: {reason}", hint="start the run again")
        endings = self._endings()
        errors = [ending for ending in endings if not ending.is_stop and not ending.is_consequence]
        if errors:
            return min(errors, key=lambda ending: ending.timestamp).error()
        told = {ending.rank for ending in endings}
        failures = self.result.failures if self.result is not None else {}
        for rank, failure in sorted(failures.items()):
            if rank not in told and failure.exitcode < 0 and interruption.number is None:
                name = signal.Signals(-failure.exitcode).name
                hint = "see in the system's log whether memory ran out" if name == "SIGKILL" else None
                return ProcessFailed(
                    f"ended by {name}", code=128 - failure.exitcode, where=f"process {rank}", hint=hint
                )
        stops = sorted((ending for ending in endings if ending.is_stop), key=lambda ending: ending.rank)
        if stops:
            return stops[0].error()  # the main process knows what is saved
        if interruption.number is not None and failures:
            name = signal.Signals(interruption.number).name
            return Interrupted(f"by {name} before anything could be saved", number=interruption.number)
        for rank, failure in sorted(failures.items()):
            if rank not in told:
                return ProcessFailed("ended without a word", code=failure.exitcode, where=f"process {rank}")
        return ProcessLost("a process of the run on another machine has ended", hint="see there") if failures else None

    def _endings(self) -> list[RankExit]:
        """Of the last start of the processes."""
        starts = sorted(self.folder.glob("*/attempt_*"), key=lambda path: int(path.name.rpartition("_")[2]))
        found = [RankExit.read(file) for file in starts[-1].rglob("error.json")] if starts else []
        return [ending for ending in found if ending is not None]


def rank_command(package: str) -> list[str]:
    """The command of this process once more, as one that a launcher can start.

    The working directory stays off the import path: what lies there must not be taken for a module.
    """
    return [sys.executable, "-P", "-m", package, *sys.argv[1:]]

"""How machines of a run find the place where they meet."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from torch.distributed.elastic.rendezvous import RendezvousParameters

from finetune.errors import EnvironmentFault
from finetune.jobs.train.launcher import RendezvousConfig, _rendezvous

KEEPER = """
import sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def kept() -> Iterator[int]:
    """A port at which another process of this machine keeps a rendezvous."""
    with subprocess.Popen([sys.executable, "-c", KEEPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.kill()


def at(port: int, is_host: bool) -> RendezvousParameters:
    parameters = RendezvousConfig(2, "127.0.0.1", port).parameters()
    parameters.config |= {"is_host": is_host, "read_timeout": 2}
    return parameters


def test_rendezvous_joins_a_store_that_another_launcher_hosts(kept: int):
    parameters = at(kept, is_host=True)
    assert _rendezvous(parameters).get_backend() == "c10d"
    assert parameters.get_as_bool("is_host") is False


def test_rendezvous_without_a_host_is_an_error(kept: int):
    parameters = at(kept, is_host=False)
    assert _rendezvous(parameters).get_backend() == "c10d"  # the control
    with pytest.raises(EnvironmentFault, match=r"no rendezvous answers at 127\.0\.0\.1:1\n"):
        _rendezvous(at(1, is_host=False))

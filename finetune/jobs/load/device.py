"""The device of this process and the group of processes that it belongs to."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState

COLLECTIVE_TIMEOUT = timedelta(hours=6)
"""How long a process waits in a collective. The main process downloads and converts models, writes checkpoints and
generates samples while the others wait; NCCL's default of 10 minutes ends such runs. A process that died needs no
timeout, because the launcher ends the others at once."""


def join_process_group() -> PartialState:
    """Join the run's process group, if there is one; the first call of a process decides its timeout."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=COLLECTIVE_TIMEOUT)


def make_accelerator() -> Accelerator:
    """The accelerator of this process, on its GPU or on the CPU."""
    # From PyTorch 2.11 on, SDPA prefers cuDNN on Hopper and Blackwell. With masks its backward pass can return NaN
    # (pytorch issue 196678), and it builds a plan for each new length, which takes about a second (FunASR issue 3704).
    torch.backends.cuda.enable_cudnn_sdp(False)
    join_process_group()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if accelerator.device.type == "cpu":
        # With several processes it is cpu:0, a different device, to which memory-mapped weights would be copied.
        accelerator.state.device = torch.device("cpu")
    return accelerator

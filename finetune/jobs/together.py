"""What the main process of a run tells the others before training."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list


def told_by_main(message: dict[str, Any] | None) -> dict[str, Any] | None:
    """The main process's message, in every process; what the others bring is not read."""
    PartialState(cpu=not torch.cuda.is_available())
    told = [message]
    broadcast_object_list(told)
    return told[0]

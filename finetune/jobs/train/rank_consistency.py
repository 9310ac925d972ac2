"""Checks that all ranks of a run read the same inputs, and messages from the main rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object

from finetune.errors import EnvironmentFault
from finetune.jobs.load.device import join_process_group
from finetune.jobs.train.resume import SAME_INPUTS, shortened

QUANTIZED_BASE = {"quantized_base": "the quantized weights of the base (fingerprint)"}


def broadcast_from_main(message: dict[str, Any] | None) -> dict[str, Any] | None:
    """The message of the main rank, on every rank; the argument of the others is ignored."""
    join_process_group()
    messages = [message]
    broadcast_object_list(messages)
    return messages[0]


def check_same_on_all_ranks(facts: Mapping[str, Any], words: Mapping[str, str] = SAME_INPUTS) -> None:
    """Check that all ranks train the same base on the same rows, because none of these are broadcast.

    Every rank must call this, and every rank raises.

    Args:
        facts: Of the run in this process.
        words: The facts to compare, with their names for messages.

    Raises:
        EnvironmentFault: A fact differs on one of the ranks.
    """
    main, *others = gather_object([{name: facts[name] for name in words}])
    for number, other in enumerate(others, 1):
        for name, word in words.items():
            if other[name] != main[name]:
                raise EnvironmentFault(
                    f"{word} differ between ranks: {shortened(main[name])} on rank 0, "
                    f"{shortened(other[name])} on rank {number}",
                    hint="give every machine the same files and the same versions of ft and of its libraries",
                )

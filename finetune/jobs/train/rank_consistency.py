"""What the processes of a run tell each other before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object

from finetune.errors import EnvironmentFault
from finetune.jobs.load.device import join_process_group
from finetune.jobs.train.resume import SAME_INPUTS, shortened

QUANTIZED_BASE = {"quantized_base": "the codes of the quantized base (fingerprint)"}


def broadcast_from_main(message: dict[str, Any] | None) -> dict[str, Any] | None:
    """The main process's message, in every process; what the others bring is not read."""
    join_process_group()
    told = [message]
    broadcast_object_list(told)
    return told[0]


def check_same_on_all_ranks(facts: Mapping[str, Any], words: Mapping[str, str] = SAME_INPUTS) -> None:
    """Make sure that all processes train the same base on the same rows: none sends its own to the others.

    All of them must come here, and all of them raise.

    Args:
        facts: Of the run in this process.
        words: Those that must be the same, and what they are called.

    Raises:
        EnvironmentFault: One of them is another in one of the processes.
    """
    main, *others = gather_object([{name: facts[name] for name in words}])
    for number, other in enumerate(others, 1):
        for name, word in words.items():
            if other[name] != main[name]:
                raise EnvironmentFault(
                    f"{word} are not the same everywhere: {shortened(main[name])} in the first process, "
                    f"{shortened(other[name])} in process {number}",
                    hint="give every machine the same files and the same versions of ft and of its libraries",
                )

"""Checks that all ranks of a run read the same inputs, and messages from the main rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object

from finetune.errors import EnvironmentFault, ProcessLost
from finetune.jobs.load.device import join_process_group
from finetune.jobs.train.resume import SAME_INPUTS, shortened
from finetune.recipe.recipe import Recipe
from finetune.run.directory import RunDirectory
from finetune.run.distributed import Rank, launch_folder, publish_run_dir

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


def claim_on_all_ranks(
    rank: Rank,
    claim: Callable[[], tuple[RunDirectory, Recipe | None]],
    read_recipe: Callable[[Path], Recipe],
) -> tuple[RunDirectory, Recipe | None]:
    """Claim the run directory on the main rank, and open the same directory on all other ranks.

    Args:
        rank: This process.
        claim: Claims the directory; called on the main rank only. Its recipe is None if the run is finished.
        read_recipe: The recipe of a run directory, for the other ranks.

    Raises:
        ProcessLost: The main rank could not claim the directory; it reports the reason itself.
    """
    if rank.is_main:
        try:
            run, recipe = claim()
        except BaseException:
            broadcast_from_main(None)  # the other ranks wait for a message, whatever happens here
            raise
        broadcast_from_main({"run": str(run.path), "trains": recipe is not None})
        return run, recipe
    message = broadcast_from_main(None)
    if message is None:
        raise ProcessLost("rank 0 could not start", hint="see its error")
    path = Path(message["run"])
    # Each machine has its own launcher: after a restart the main rank may be on this one, and reads the path here.
    if (launch := launch_folder()) is not None:
        publish_run_dir(launch, path)
    return RunDirectory.open(path, is_writer=False), read_recipe(path) if message["trains"] else None

"""Training state on disk, as safetensors and JSON: reading it executes no code.

The order of rows, the learning rate and dropout are functions of seed and step, so counters suffice for them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from typing_extensions import TypedDict

from finetune.adapters.base import trainable
from finetune.errors import DivergedError, EnvironmentFault, RefusedError
from finetune.models.fsdp import all_gathered, local_shard, read_like
from finetune.models.safetensors_io import Planned, file_writer, tensors_in
from finetune.storage.opening import read_json, write_new
from finetune.storage.records import Count, Flag, Integer, Number, adapter, with_other_keys
from finetune.train.state import TrainState

TRAINED = "trained.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"

COUNTERS = ("step", "tokens", "seconds", "loss", "validation_step", "validation_loss_before")
"""Attributes of TrainState that are plain numbers."""

EARLIER_COUNTERS = {"validation_step": "held_out_step", "validation_loss_before": "held_out_before"}
"""Names of counters in checkpoints of version 0.1."""


class _Values(TypedDict):
    """The state of one parameter: names of its tensors, and its plain numbers."""

    tensors: list[str]
    values: dict[str, Number | Integer | Flag | None]


_Earlier = TypedDict("_Earlier", {"held_out_step": Count | None, "held_out_before": float | None}, total=False)  # noqa: UP013
"""Keys of earlier versions."""


@with_other_keys
class _Counters(_Earlier, total=False):
    """The counters of a TrainState."""

    step: Count
    tokens: Count
    seconds: Number
    loss: float | None
    validation_step: Count | None
    validation_loss_before: float | None


@with_other_keys
class _SavedState(TypedDict):
    """The content of `state.json`."""

    counters: _Counters
    scaler: dict[str, Number]
    optimizer: dict[str, _Values]


def write_state(state: TrainState, folder: Path | None) -> None:
    """Write the training state into an empty folder, one tensor at a time.

    Args:
        state: If trainable parameters are sharded, every rank must call this.
        folder: None on ranks that do not write and only take part in the all-gather.

    Raises:
        DivergedError: A value is NaN or infinite: such a state is never saved.
        EnvironmentFault: The disk has too little space.
    """
    model = state.bare_model
    trained = state.method.state(model)
    entries, moments = _optimizer_state(state.optimizer, trainable(model))
    _refuse_non_finite(state, {**trained, **moments})
    # Tensors are gathered lazily, in this order: one full tensor is in memory at a time.
    with all_gathered({**trained, **moments}) as tensors:
        if folder is None:
            return
        plans = {
            file: {name: Planned(tensor.dtype, tuple(tensor.shape)) for name, tensor in part.items()}
            for file, part in ((TRAINED, trained), (OPTIMIZER, moments))  # in the order of the gather
        }
        _refuse_full_disk(folder, sum(plan.bytes for part in plans.values() for plan in part.values()))
        for file, planned in plans.items():
            with file_writer(folder / file, planned) as writer:
                for name, tensor in islice(tensors, len(planned)):
                    writer.put(name, tensor)
    counters = {name: getattr(state, name) for name in COUNTERS}
    written = {"counters": counters, "scaler": state.scaler.state_dict(), "optimizer": entries}
    write_new(folder / STATE, json.dumps(written, indent=2) + "\n")


def read_state(state: TrainState, folder: Path) -> None:
    """Restore what `write_state` wrote into a fresh state of the same recipe.

    Raises:
        RefusedError: A part is missing, or does not match this model and optimizer.
    """
    for name in (TRAINED, OPTIMIZER, STATE):
        if not (folder / name).is_file():
            raise _lacking(name, folder)
    written = _saved_state(folder)
    counters = written["counters"]
    for name in COUNTERS:
        key = name if name in counters else EARLIER_COUNTERS.get(name, name)
        if key not in counters:
            raise _lacking(f"the counter {name}", folder)
        setattr(state, name, counters[key])  # type: ignore[literal-required]
    model = state.bare_model
    state.method.restore(model, _read(folder / TRAINED, state.method.own_tensors(model).get))
    parameters = trainable(model)
    moments = _read(folder / OPTIMIZER, lambda name: parameters.get(name.rpartition(":")[0]))
    _restore_optimizer(state, written["optimizer"], moments, folder)
    if state.scaler.is_enabled() and written["scaler"]:
        state.scaler.load_state_dict(written["scaler"])


def _saved_state(folder: Path) -> _SavedState:
    """Read `state.json`.

    Raises:
        RefusedError: It is damaged, or a part is missing or has another type.
    """
    try:
        return cast(_SavedState, adapter(_SavedState).validate_python(read_json(folder / STATE)))
    except ValidationError as error:
        place = ".".join(map(str, error.errors(include_url=False)[0]["loc"]))
        reason = f"is damaged at {place}" if place else "is damaged"
    except (OSError, ValueError) as error:
        reason = f"is damaged: {error}"
    raise RefusedError(f"{STATE} {reason}", where=str(folder), hint="remove it to resume from an earlier one")


def _optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """The state of any optimizer, by the names of parameters.

    Returns:
        For each parameter its `values`, plain numbers, and the keys of its `tensors`; then the tensors themselves, by
        `parameter:key`.
    """
    if torch.cuda.is_available():  # the GPU may still be writing to paged state, which is read from the CPU here
        torch.cuda.synchronize()
    entries: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        own = {key: value.detach() for key, value in sorted(state.items()) if isinstance(value, Tensor)}
        values = {key: value for key, value in state.items() if key not in own}  # such as bitsandbytes' step
        entries[name] = {"tensors": sorted(own), "values": values}
        tensors |= {f"{name}:{key}": tensor for key, tensor in own.items()}
    return entries, tensors


def _restore_optimizer(
    state: TrainState, entries: Mapping[str, _Values], tensors: Mapping[str, Tensor], folder: Path
) -> None:
    parameters = trainable(state.bare_model)
    listed = {f"{name}:{key}" for name, entry in entries.items() for key in entry["tensors"]}
    for lacking in sorted((parameters.keys() - entries.keys()) | (listed - tensors.keys())):
        raise _lacking(f"the optimizer's state of {lacking}", folder)
    for stranger in sorted((entries.keys() - parameters.keys()) | (tensors.keys() - listed)):
        raise RefusedError(
            f"the checkpoint has optimizer state of {stranger}, which is not trainable", where=str(folder)
        )
    for name, parameter in parameters.items():
        placed = {
            key: _placed(state.optimizer, parameter, key, tensors[f"{name}:{key}"]) for key in entries[name]["tensors"]
        }
        if restored := {**entries[name]["values"], **placed}:
            state.optimizer.state[parameter] = restored


def _placed(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, key: str, tensor: Tensor) -> Tensor:
    """A tensor of optimizer state, on the device where the optimizer expects it."""
    if key == "step":  # PyTorch's optimizers count on the CPU
        return tensor
    # Paged moments of bitsandbytes must be in its unified memory: copy into a buffer of its own.
    if key in ("state1", "state2") and getattr(optimizer, "is_paged", False):
        paged: Tensor = optimizer.get_state_buffer(parameter, dtype=tensor.dtype)  # type: ignore[attr-defined]
        return paged.copy_(tensor)
    return tensor.to(parameter.device)


def _read(file: Path, like: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """The tensors of a file; of those that `like` maps to a sharded tensor only the local shard."""
    return {name: read_like(stored, like(name)) for name, stored in tensors_in(file).items()}


def _refuse_non_finite(state: TrainState, tensors: Mapping[str, Tensor]) -> None:
    name = next((name for name, tensor in tensors.items() if not local_shard(tensor).isfinite().all()), None)
    # All ranks raise together: one alone would leave the others waiting in the all-gather.
    if state.agreed_by_any(name is not None):
        raise DivergedError(
            f"{name or 'a tensor on another rank'} is not finite, although loss and gradient were",
            where=f"step {state.step}",
            hint="lower optimizer.learning_rate, or lengthen the warm-up",
        )


def _refuse_full_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise EnvironmentFault(
            f"{needed / 1e6:.1f} MB are needed, and {free / 1e6:.1f} MB are free",
            where=str(folder.parent),
            hint="make room on the disk",
        )


def _lacking(part: str, folder: Path) -> RefusedError:
    return RefusedError(
        f"the checkpoint lacks {part}", where=str(folder), hint="remove it to resume from an earlier one"
    )

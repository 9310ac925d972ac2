"""The layers that `target_modules` name, and those of them that a method cannot adapt."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from finetune.models.layer_names import ends_with, shown
from finetune.models.linear_layers import LINEAR_TYPES, LayerKind, kind_of, modules_with_weight
from finetune.quantizers.direct_weights import is_read_directly

ALL_LINEAR = "all-linear"


EXPERT_NAMES = ("experts", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3")
"""Endings of the names of experts in checkpoints."""


def targets_experts(target: str) -> bool:
    """Whether an entry of `target_modules` may name experts."""
    return target.rpartition(".")[2] in EXPERT_NAMES


class Targets(NamedTuple):
    """The layers that a recipe's `target_modules` name.

    Attributes:
        adapted: The layers that are adapted, by name.
        excluded: For each other module of such a name, the reason why it is not.
    """

    adapted: dict[str, nn.Module]
    excluded: dict[str, str]

    @property
    def note(self) -> str | None:
        """What is left out and why, in words; None if nothing is."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.excluded.items():
            by_reason.setdefault(reason, []).append(name)
        parts = [f"{shown(names)} ({len(names)}: {reason})" for reason, names in by_reason.items()]
        return f"not adapted: {'; '.join(parts)}" if parts else None


def find_targets(model: PreTrainedModel, targets: str | Sequence[str], kinds: Collection[LayerKind]) -> Targets:
    """The layers that `target_modules` name, matched as PEFT matches them.

    Args:
        model: The base without adapter; on the meta device too.
        targets: `all-linear`, for all linear layers but the output head; or name endings.
        kinds: Kinds of layers that the method adapts.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if targets == ALL_LINEAR:
        head = model.get_output_embeddings()
        named = {n: each for n, each in modules.items() if isinstance(each, LINEAR_TYPES) and each is not head}
    else:
        named = {name: each for name, each in modules.items() if any(ends_with(name, target) for target in targets)}
    objections = {name: objection(model, name, each, kinds) for name, each in named.items()}
    return Targets(
        {name: each for name, each in named.items() if objections[name] is None},
        {name: reason for name, reason in objections.items() if reason is not None},
    )


def adaptation_note(model: PreTrainedModel, targets: str | Sequence[str], kinds: Collection[LayerKind]) -> str | None:
    """What a user should know of how `target_modules` apply to a base, in words; None if there is nothing."""
    found = find_targets(model, targets, kinds)
    tied = modules_with_weight(model, model.get_input_embeddings().weight)
    adapted = [name for name in tied if name in found.adapted]
    notes = [found.note]
    if adapted and len(tied) > 1:
        notes.append(f"{' and '.join(tied)} are tied, and each is adapted by itself if at all: ft merge unties them")
    return "; ".join(filter(None, notes)) or None


def objection(model: PreTrainedModel, name: str, module: Any, kinds: Collection[LayerKind]) -> str | None:
    """Why a module cannot be adapted, in words; None if it can."""
    kind = kind_of(module)
    if kind not in kinds:
        return {"embedding": "an embedding", "conv1d": "a transposed weight (Conv1D)"}.get(
            str(kind), f"no linear layer ({type(module).__name__})"
        )
    return "the model reads its weight without calling it" if is_read_directly(model, name) else None

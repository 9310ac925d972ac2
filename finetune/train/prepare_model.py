"""One order of preparing a loaded base for training, which memory estimates follow too."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel

from finetune.models.kernels.selective_checkpointing import recompute_outputs, up_projections
from finetune.recipe.sections.training import Checkpointing, recomputes_blocks


def prepare_model(
    base: PreTrainedModel,
    checkpointing: Checkpointing,
    *,
    kernels: Callable[[PreTrainedModel], None],
    packing: Callable[[PreTrainedModel], None],
    attach: Callable[[PreTrainedModel], nn.Module],
    offload: bool = False,
    log: Callable[[str], None] = lambda message: None,
) -> nn.Module:
    """Make a base the trainable model of a run.

    Args:
        base: As it is loaded; changed in place.
        checkpointing: `training.gradient_checkpointing`.
        kernels: Replaces the forward passes of norms, gated MLPs or blocks.
        packing: Chooses the attention for packed rows and checks it.
        attach: Adds what the method trains.
        offload: Whether the inputs of checkpointed blocks move to the CPU.
        log: Called with what selective checkpointing recomputes.

    Returns:
        The model with the method attached.
    """
    # Kernels come first: the packing check and the adapters must see those that train.
    kernels(base)
    packing(base)
    if recomputes_blocks(checkpointing):
        base.activation_checkpointing_enable({"use_reentrant": False}, offload=offload)
    # By name and before attaching: adapters wrap layers, and wrapped layers have other shapes.
    recomputed = up_projections(base) if checkpointing == "selective" else []
    model = attach(base)
    if checkpointing == "selective":
        log(recompute_outputs(base, recomputed))
    return model

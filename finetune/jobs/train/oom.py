"""Hints for a training step that runs out of memory."""

from __future__ import annotations

import torch

from finetune.errors import OutOfMemoryError
from finetune.recipe.recipe import Recipe
from finetune.recipe.rules import RULES


def oom_error_with_hints(recipe: Recipe, step: int, resume_command: str | None) -> OutOfMemoryError:
    """The error, with settings that lower the memory of a step.

    Args:
        recipe: Of the run.
        step: From 1.
        resume_command: The command that resumes the run; None where nothing is saved yet.
    """
    smaller = less_memory(recipe)
    if smaller is None:
        hint = "lower data.max_length, or quantize the base to fewer bits"
    elif resume_command is None:
        hint = "set " + " and ".join(f"{key}: {value}" for key, value in smaller.items())
    else:
        hint = " ".join([resume_command, *(f"--set {key}={value}" for key, value in smaller.items())])
    return OutOfMemoryError(f"out of memory in step {step}", hint=hint)


def less_memory(recipe: Recipe) -> dict[str, str] | None:
    """Keys and values that lower the memory of a step and keep its rows; None where there are none."""
    training = recipe.training
    size = training.micro_batch_size
    if size > 1:
        factor = next(number for number in range(2, size + 1) if size % number == 0)
        return {
            "training.micro_batch_size": str(size // factor),
            "training.gradient_accumulation_steps": str(training.gradient_accumulation_steps * factor),
        }
    if training.recomputes_blocks:
        moves = training.gradient_checkpointing is True and torch.cuda.is_available()
        return {"training.gradient_checkpointing": "offload"} if moves else None
    recomputing = training.model_copy(update={"gradient_checkpointing": True})
    is_possible = not any(rule(recipe.model_copy(update={"training": recomputing})) for rule in RULES)
    return {"training.gradient_checkpointing": "true"} if is_possible else None

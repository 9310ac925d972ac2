"""Rules on several processes."""

from __future__ import annotations

from finetune.recipe.recipe import Recipe
from finetune.recipe.rules.violation import Violation, quantizations


def fsdp_excludes_int8(recipe: Recipe) -> Violation | None:
    """The scales of int8 belong to the parameter class of bitsandbytes, which a shard is not an instance of."""
    for key, section, _ in quantizations(recipe):
        if recipe.distributed.strategy == "fsdp" and section.kind == "int8":
            return Violation(
                f"{key}.kind",
                "int8 keeps scales in bitsandbytes' own parameters, which distributed.strategy: fsdp cannot shard",
                "set it to affine with bits: 8, or distributed.strategy to ddp",
            )
    return None


def fsdp_needs_elementwise_optimizer(recipe: Recipe) -> Violation | None:
    """Elementwise moments of a shard equal those of the full weight; moments of blocks, rows or columns do not."""
    is_sharded = recipe.distributed.strategy == "fsdp" and recipe.adapter.trains_base
    if is_sharded and recipe.optimizer.name not in ("adamw", "sgd"):
        return Violation(
            "optimizer.name",
            f"{recipe.optimizer.name} keeps moments of blocks, rows or columns of a weight, "
            "which distributed.strategy: fsdp would split between processes",
            "set it to adamw, whose moments are sharded as well, or distributed.strategy to ddp",
        )
    return None

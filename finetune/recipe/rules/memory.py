"""Rules on storage types, quantization and recomputation."""

from __future__ import annotations

from finetune.recipe.recipe import Recipe
from finetune.recipe.rules.violation import Violation, module_quantizations, quantizations
from finetune.recipe.sections.adapter import PrefixTuning


def full_needs_full_precision(recipe: Recipe) -> Violation | None:
    """Quantized codes have no gradient, so they cannot train."""
    if recipe.adapter.trains_base and recipe.quantization.kind != "none":
        return Violation(
            "quantization.kind",
            f"a base quantized to {recipe.quantization.kind} cannot be trained by adapter.method: full",
            "set quantization to {kind: none}, or train an adapter: {method: lora}",
        )
    return None


def full_needs_unquantized_modules(recipe: Recipe) -> Violation | None:
    """The same for single layers."""
    for key, section, _ in module_quantizations(recipe):
        if recipe.adapter.trains_base and section.quantizes:
            return Violation(
                f"{key}.kind",
                f"layers quantized to {section.kind} cannot be trained by adapter.method: full",
                "leave the rule out, or train an adapter: {method: lora}",
            )
    return None


def adapter_needs_full_precision_base(recipe: Recipe) -> Violation | None:
    """Some methods compute with the weight's values, and a quantized layer stores codes."""
    for key, section, _ in quantizations(recipe):
        if recipe.adapter.needs_full_precision and section.quantizes:
            return Violation(
                f"{key}.kind",
                f"adapter.method: {recipe.adapter.method} works over full-precision weights only",
                "set it to none, or adapter.method to lora",
            )
    return None


def prefix_tuning_excludes_checkpointing(recipe: Recipe) -> Violation | None:
    """Checkpointed layers run without a key-value cache, and the prefix is passed in that cache."""
    if isinstance(recipe.adapter, PrefixTuning) and recipe.training.recomputes_blocks:
        return Violation(
            "training.gradient_checkpointing",
            "recomputed layers drop the keys and values that prefix_tuning trains",
            "set it to false, or adapter.method to prompt_tuning",
        )
    return None


def selective_checkpointing_excludes_compiled_blocks(recipe: Recipe) -> Violation | None:
    """The compiler chooses the activations that a compiled block saves for backward."""
    if recipe.model.kernels == "compiled" and recipe.training.gradient_checkpointing == "selective":
        return Violation(
            "training.gradient_checkpointing",
            "selective recomputes single layers, and model.kernels: compiled compiles whole blocks",
            "set it to true, or leave model.kernels out",
        )
    return None


def float16_weights_cannot_train(recipe: Recipe) -> Violation | None:
    """Loss scaling needs float32 master weights: float16 gradients of float16 weights underflow."""
    if recipe.adapter.trains_base and recipe.model.dtype == "float16":
        return Violation(
            "model.dtype",
            "float16 weights cannot be trained: their gradients underflow",
            "set model.dtype to float32 and training.precision to float16 or bfloat16",
        )
    return None


def stochastic_rounding_needs_bfloat16_weights(recipe: Recipe) -> Violation | None:
    """Adapters and float32 weights are not rounded; the update of a shard would be rounded by its process alone."""
    if recipe.optimizer.rounding != "stochastic":
        return None
    if not (recipe.adapter.trains_base and recipe.model.dtype == "bfloat16"):
        return Violation(
            "optimizer.rounding",
            "the recipe trains float32 weights, which are not rounded",
            "leave it out, or set adapter.method to full and model.dtype to bfloat16",
        )
    if recipe.distributed.strategy == "fsdp":
        return Violation(
            "optimizer.rounding",
            "distributed.strategy: fsdp shards the weights, and shards are not rounded stochastically",
            "leave it out, or set model.dtype to float32 or distributed.strategy to ddp",
        )
    return None

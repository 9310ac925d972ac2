"""Whether vLLM can serve a recipe's adapter; for `ft validate`, `ft export` and `ft eval --engine vllm`."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.errors import UnsupportedError
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.adapter import AdapterSection, LowRank, QaLora
from finetune.recipe.sections.modules import ModuleRule

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank, from `MaxLoRARanks` of its configuration."""

STANDALONE = {"merge": "merge it and serve the model: ft merge", "export": "write it into the model: ft export"}


def vllm_lora_rank(adapter: AdapterSection, rules: Sequence[ModuleRule], adds_tokens: bool = False) -> int:
    """The smallest --max-lora-rank with which vLLM serves the adapter over a base that it loads.

    Args:
        adapter: The adapter.
        rules: Settings of single layers.
        adds_tokens: Whether `model.new_tokens` adds rows to the base.

    Raises:
        UnsupportedError: vLLM refuses the adapter, or ignores a part of it.
    """
    hint = STANDALONE.get(adapter.standalone_by or "", "use ft generate and ft eval: no other program loads it")
    if not isinstance(adapter, LowRank):
        raise UnsupportedError(
            f"vLLM serves LoRA adapters only, not {adapter.method}", where="adapter.method", hint=hint
        )
    if isinstance(adapter, QaLora):
        raise UnsupportedError(
            "the adapter belongs to a base that only ft stores",
            where="adapter.method",
            hint="merge it into plain weights and serve those: ft merge --dtype bfloat16",
        )
    if adds_tokens:
        raise UnsupportedError(
            "vLLM loads the base as it is, without rows for new tokens", where="model.new_tokens", hint=hint
        )
    for key, what in (
        ("dora", "vLLM serves no DoRA"),
        ("modules_to_save", "vLLM refuses adapters with fully trained modules"),
        ("trainable_tokens", "vLLM does not load trained embeddings of single tokens"),
    ):
        if getattr(adapter, key, None):
            raise UnsupportedError(what, where=f"adapter.{key}", hint=hint)
    settings = [rule.adapter for rule in rules if rule.adapter is not None]
    # AdaLoRA is saved as a LoRA of the largest final rank, padded with zeros, with scale 1 in every layer.
    if adapter.method != "adalora" and any(each.r or each.alpha for each in settings):
        raise UnsupportedError(
            "versions of vLLM use one rank and scale for all layers, and modules sets others",
            where="modules",
            hint=hint,
        )
    # PiSSA and OLoRA are saved as the difference to their initialization, which has twice the rank.
    rank = adapter.r * (2 if getattr(adapter, "initialization", "zero") in ("pissa", "olora") else 1)
    sufficient = [each for each in RANKS if each >= rank]
    if not sufficient:
        raise UnsupportedError(f"vLLM serves ranks up to {RANKS[-1]}, not {rank}", where="adapter.r", hint=hint)
    return sufficient[0]


def describe_vllm_support(recipe: Recipe) -> str:
    """Whether and how vLLM serves the result of a recipe, in words."""
    if recipe.adapter.trains_base:
        return "vLLM serves the trained model as it is"
    try:
        rank = vllm_lora_rank(recipe.adapter, recipe.modules, recipe.model.new_tokens is not None)
    except UnsupportedError as refusal:
        return f"vLLM does not serve the adapter: {refusal.what} ({refusal.where}); {refusal.hint}"
    sections = [recipe.quantization, *(rule.quantization for rule in recipe.modules if rule.quantization)]
    kinds = sorted({section.kind for section in sections if section.quantizes})
    over = f", over the unquantized base, not in {', '.join(kinds)}" if kinds else ""
    return f"vLLM serves the adapter with --max-lora-rank {rank}{over}"

"""What vLLM serves of what a recipe trains: told by `ft validate`, `ft export` and `ft eval --engine vllm` alike."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.errors import UnsupportedError
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.adapter import AdapterSection, LowRank, QaLora
from finetune.recipe.sections.modules import ModuleRule

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank can be, from its configuration's MaxLoRARanks."""

STANDALONE = {"merge": "merge it and serve the model: ft merge", "export": "write it into the model: ft export"}


def vllm_lora_rank(adapter: AdapterSection, rules: Sequence[ModuleRule]) -> int:
    """The least --max-lora-rank under which vLLM serves the adapter over a base that it loads.

    Args:
        adapter: What is trained.
        rules: What differs for single layers.

    Raises:
        UnsupportedError: It would refuse the adapter, or ignore a part of it.
    """
    remedy = STANDALONE.get(adapter.standalone_by or "", "use ft generate and ft eval: no other program reads it")
    if not isinstance(adapter, LowRank):
        raise UnsupportedError(
            f"vLLM serves LoRA adapters, and none that {adapter.method} trains", where="adapter.method", hint=remedy
        )
    if isinstance(adapter, QaLora):
        raise UnsupportedError(
            "the adapter belongs to a base that only ft stores",
            where="adapter.method",
            hint="merge it into plain weights and serve those: ft merge --dtype bfloat16",
        )
    for key, what in (
        ("dora", "vLLM serves no DoRA"),
        ("modules_to_save", "vLLM refuses adapters with whole modules"),
        ("trainable_tokens", "vLLM does not read trained embeddings of single tokens"),
    ):
        if getattr(adapter, key, None):
            raise UnsupportedError(what, where=f"adapter.{key}", hint=remedy)
    own = [rule.adapter for rule in rules if rule.adapter is not None]
    if adapter.method != "adalora" and any(each.r or each.alpha for each in own):
        raise UnsupportedError(
            "versions of vLLM give every layer the same rank and scale, and modules sets others",
            where="modules",
            hint=remedy,
        )
    rank = adapter.r * (2 if getattr(adapter, "initialization", "zero") in ("pissa", "olora") else 1)
    fitting = [each for each in RANKS if each >= rank]
    if not fitting:
        raise UnsupportedError(f"vLLM serves ranks up to {RANKS[-1]}, not {rank}", where="adapter.r", hint=remedy)
    return fitting[0]


def describe_vllm_support(recipe: Recipe) -> str:
    """In words, whether vLLM will serve what is trained, and how."""
    if recipe.adapter.trains_base:
        return "vLLM serves the trained model as it is"
    try:
        rank = vllm_lora_rank(recipe.adapter, recipe.modules)
    except UnsupportedError as refusal:
        return f"vLLM does not serve the adapter: {refusal.what} ({refusal.where}); {refusal.hint}"
    sections = [recipe.quantization, *(rule.quantization for rule in recipe.modules if rule.quantization)]
    kinds = sorted({section.kind for section in sections if section.quantizes})
    over = f", over the base as its files have it and not in {', '.join(kinds)}" if kinds else ""
    return f"vLLM serves the adapter with --max-lora-rank {rank}{over}"

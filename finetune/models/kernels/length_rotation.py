"""Rotary frequencies that depend on the longest row of a forward pass: LongRoPE and dynamic NTK.

Sources: LongRoPE, Ding et al. 2024, arXiv 2402.13753; dynamic NTK scaling, `modeling_rope_utils` of transformers. Both
take the frequencies of the pretraining for passes whose rows all have at most its length, and others above it. All rows
of a pass have the same ones, so a short row beside a long one is computed with the frequencies of the long one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn


@dataclass(frozen=True)
class LengthRotation:
    """Which rows may be in one forward pass, because each of them has the same frequencies alone.

    Attributes:
        original: Most tokens of a row that has the frequencies of the pretraining.
        each_length: Whether every greater length has frequencies of its own (dynamic NTK) or all of them have the same
            (LongRoPE).
        prompt: Positions of a soft prompt before each row.
    """

    original: int
    each_length: bool
    prompt: int = 0

    @classmethod
    def of(cls, config: Any) -> LengthRotation | None:
        """The rotation of a model with this configuration; None where it does not depend on lengths."""
        text = config.get_text_config()
        found: set[tuple[int, bool]] = set()
        for parameters in _rope_parameters(text):
            if "dynamic" in (kind := str(parameters.get("rope_type"))):
                found.add((text.max_position_embeddings, True))
            elif kind == "longrope":
                found.add((parameters["original_max_position_embeddings"], False))
        if not found:
            return None
        originals = {original for original, _ in found}
        # Layers with different bounds: no two lengths above the smallest one are known to have the same frequencies.
        each_length = len(originals) > 1 or any(each for _, each in found)
        return cls(min(originals), each_length)

    def group(self, tokens: int) -> int:
        """The group of a row of so many tokens: 0 up to the original length. Passes have rows of one group."""
        tokens += self.prompt
        if tokens <= self.original:
            return 0
        return tokens if self.each_length else 1

    def generation_group(self, tokens: int, new_tokens: int) -> int:
        """The group of a prompt that is continued by up to `new_tokens`; batches have prompts of one group.

        Prompts whose answers may cross the original length, and all longer ones with frequencies for each length, are
        in a batch with prompts of the same length: they cross it at the same token.
        """
        tokens += self.prompt
        if tokens + new_tokens <= self.original:
            return 0
        return -1 if tokens > self.original and not self.each_length else tokens


def length_rotation(model: nn.Module) -> LengthRotation | None:
    """The rotation of a loaded model, bare or wrapped by DDP, with or without an adapter."""
    bare = getattr(model, "module", model)
    config = getattr(bare, "config", None)
    rotation = None if config is None else LengthRotation.of(config)
    return rotation and replace(rotation, prompt=getattr(bare, "prompt_tokens", 0))


def forget_earlier_lengths(model: nn.Module) -> None:
    """Make each pass of a model with dynamic NTK independent of the passes before it.

    transformers keeps the frequencies of the longest row so far, until a pass has less than the original length.
    """
    for module in model.modules():
        if any("dynamic" in kind for kind in _rope_types(module).values()):
            module.register_forward_pre_hook(_restore_frequencies)


def _restore_frequencies(module: Any, arguments: Any) -> None:
    for prefix, kind in _rope_types(module).items():
        if "dynamic" in kind:
            current = getattr(module, f"{prefix}inv_freq")
            setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").to(current.device))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _rope_types(module: Any) -> dict[str, str]:
    """The kinds of frequencies of a rotary embedding by the prefix of their tensors; empty for other modules."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, Mapping):
        return {f"{layers}_": str(kind) for layers, kind in kinds.items()}
    return {"": kinds} if isinstance(kinds, str) and hasattr(module, "original_inv_freq") else {}


def _rope_parameters(text: Any) -> list[Mapping[str, Any]]:
    """The rotation's settings in a configuration: one section, or one for each kind of layer; none without rotation."""
    parameters = getattr(text, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return [parameters]
    return [each for each in parameters.values() if isinstance(each, Mapping)]

"""LoRA: y = W x + (alpha / r) B A x with W frozen, A of shape (r, in), B of shape (out, r) and B = 0 at first.

Source: Hu et al. 2021, arXiv 2106.09685, section 4.1. A starts Kaiming-uniform as in the authors' code. With rank
stabilisation the update is scaled by alpha / sqrt(r): Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path

from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.adapters import peft_bridge
from finetune.adapters.base import AdapterMethod
from finetune.adapters.initialization import orthonormal, principal
from finetune.adapters.low_rank import DifferenceLinear, IecLinear, LowRankLinear
from finetune.models.linear_layers import LINEAR_TYPES, linear_layers
from finetune.recipe.sections.adapter import Lora, LowRank
from finetune.recipe.sections.modules import setting_for


class LowRankMethod(AdapterMethod):
    """What LoRA, QA-LoRA and AdaLoRA share: which layers get an update of which rank, and its two forms on disk."""

    section: LowRank

    @property
    @abstractmethod
    def layer(self) -> type[LowRankLinear]:
        """The form of the update."""

    def attach(self, model: PreTrainedModel, total_steps: int) -> nn.Module:
        """Add an update of rank r beside each target layer."""
        return peft_bridge.attach(model, self._config(linear_layers(model)), self.section.target_modules)

    def load_initial_adapter(self, model: nn.Module, folder: Path) -> None:
        """Start from a saved adapter of the same form."""
        peft_bridge.load_initial_adapter(model, folder)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the adapter as stock PEFT reads it; beside it the native tensors where they are others."""
        if self.layer is LowRankLinear:
            peft_bridge.save(model, folder)
        else:
            peft_bridge.save_as_lora(model, self._stock_config(peft_bridge.low_rank_layers(model)), folder)

    def load(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        """Put a saved adapter on a base."""
        return peft_bridge.load(model, self._config(linear_layers(model)), folder)

    def detach(self, model: nn.Module) -> PreTrainedModel:
        """Drop the adapter."""
        return peft_bridge.unload(model)

    def mergeable(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        """W + (alpha / r) B A: exact but for the rounding of W's dtype."""
        return peft_bridge.load_stock(model, self._stock_config(linear_layers(model)), folder)

    def _config(self, layers: Iterable[str]) -> LoraConfig:
        """The configuration of the layers that train."""
        config = self._lora_config(layers, lambda r, alpha: (r, alpha))
        config._register_custom_module(dict.fromkeys(LINEAR_TYPES, self.layer))
        return config

    def _stock_config(self, layers: Iterable[str]) -> LoraConfig:
        """The configuration of the form that stock PEFT reads."""
        return self._lora_config(layers, lambda r, alpha: (r, alpha))

    def _lora_config(self, layers: Iterable[str], size: Callable[[int, float], tuple[int, float]]) -> LoraConfig:
        """LoRA on the recipe's part of `layers`; `size` turns its rank and alpha into those of the configuration."""
        section = self.section
        ranks, alphas, skipped = {}, {}, []
        for name in layers:
            own = setting_for(self.modules, name, "adapter")
            if own is not None and own.skip:
                skipped.append(name)
            elif own is not None:
                ranks[name], alphas[name] = size(own.r or section.r, own.alpha or section.alpha)
        r, alpha = size(section.r, section.alpha)
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=r,
            lora_alpha=_short(alpha),
            lora_dropout=section.dropout,
            target_modules=peft_bridge.as_targets(section.target_modules),
            rank_pattern=ranks,
            alpha_pattern={name: _short(alpha) for name, alpha in alphas.items()},
            exclude_modules=skipped or None,
            modules_to_save=list(section.modules_to_save) or None,
            trainable_token_indices=self._trained_tokens() or None,
            ensure_weight_tying=True,
        )

    def _trained_tokens(self) -> list[int]:
        return peft_bridge.token_ids(self.section.trainable_tokens, self.tokenizer, "adapter.trainable_tokens")


class LoraMethod(LowRankMethod):
    """LoRA over full-precision or quantized layers, with the variants that the recipe asks for."""

    convention = (
        "W x + s B A x, s = alpha / r or alpha / sqrt(r); iec: both factors after equation 16 of arXiv 2402.05445; "
        "pissa, olora: B A without its start; dora: rows scaled to learned lengths"
    )
    section: Lora

    @property
    def layer(self) -> type[LowRankLinear]:
        """The form of the update."""
        if self.section.iec:
            return IecLinear
        return DifferenceLinear if self.section.initialization in ("pissa", "olora") else LowRankLinear

    def own_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """And what anchored layers started from: a singular value decomposition differs with the number of threads."""
        starts = {name: parameter for name, parameter in model.named_parameters() if "lora_start_" in name}
        return {**super().own_tensors(model), **starts}

    def initialize(self, model: nn.Module, original: Callable[[str], Tensor]) -> None:
        """Start from a part of the weight, if the recipe asks for it.

        Source: Meng et al. 2024 (PiSSA), arXiv 2404.02948; Büyükakyüz 2024 (OLoRA), arXiv 2406.01775; Li et al. 2023
        (LoftQ), arXiv 2310.08659, algorithm 1 with one alternation, since the base is quantized already.
        """
        for name, layer in peft_bridge.low_rank_layers(model).items():
            weight_OI = layer.base_weight()
            for adapter in layer.active_adapters:
                r, scaling = layer.r[adapter], layer.scaling[adapter]
                match self.section.initialization:
                    case "pissa":
                        layer.start_from(adapter, principal(weight_OI / scaling, r))
                    case "olora":
                        layer.start_from(adapter, orthonormal(weight_OI, r))
                    case "loftq":
                        # The file is read onto the CPU, the base may lie on a GPU.
                        error_OI = original(name).to(weight_OI) - weight_OI
                        layer.start_from(adapter, principal(error_OI / scaling, r))

    def lr_multiplier(self, parameter: str) -> float:
        """LoRA+: B learns faster than A. Source: Hayou et al. 2024, arXiv 2402.12354, section 5."""
        return self.section.loraplus_ratio if ".lora_B." in parameter else 1.0

    def _config(self, layers: Iterable[str]) -> LoraConfig:
        config = super()._config(layers)
        config.use_rslora, config.use_dora = self.section.rslora, self.section.dora
        return config

    def _stock_config(self, layers: Iterable[str]) -> LoraConfig:
        if self.layer is LowRankLinear:
            config = self._lora_config(layers, lambda r, alpha: (r, alpha))
            config.use_rslora, config.use_dora = self.section.rslora, self.section.dora
            return config
        return self._lora_config(layers, self._stock_size)

    def _stock_size(self, r: int, alpha: float) -> tuple[int, float]:
        """What an anchored layer starts from is as many ranks more; the scale stays."""
        rank = 2 * r if self.layer.anchored else r
        return rank, alpha / (r**0.5 if self.section.rslora else r) * rank


def _short(alpha: float) -> float:
    """Engines that serve adapters declare alpha as an integer."""
    return int(alpha) if float(alpha).is_integer() else alpha

"""LoRA: y = W x + (alpha / r) B A x with W frozen, A of shape (r, in), B of shape (out, r) and B initially 0.

Source: Hu et al. 2021, arXiv 2106.09685, section 4.1. A starts Kaiming-uniform as in the authors' code. With rank
stabilisation the update is scaled by alpha / sqrt(r): Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.adapters import peft_bridge
from finetune.adapters.base import AdapterMethod
from finetune.adapters.initialization import orthonormal, principal
from finetune.adapters.low_rank import DifferenceLinear, IecLinear, LowRankLinear
from finetune.adapters.name_checks import (
    is_within,
    new_token_violations,
    rank_violations,
    rule_violations,
    saved_module_violations,
    target_violations,
    token_violations,
    twice_trained_violations,
)
from finetune.adapters.targets import ALL_LINEAR, adaptation_note, find_targets, targets_experts
from finetune.adapters.token_rows import merged_ids
from finetune.models.linear_layers import LINEAR_KINDS, LINEAR_TYPES, LayerKind, linear_layers
from finetune.quantizers.base import is_quantized
from finetune.recipe.rules.violation import Violation
from finetune.recipe.sections.adapter import Lora, LowRank
from finetune.recipe.sections.modules import setting_for


def _keep_rank(r: int, alpha: float) -> tuple[int, float]:
    """The identity: rank and alpha of the recipe."""
    return r, alpha


class LowRankMethod(AdapterMethod):
    """Base of LoRA, QA-LoRA and AdaLoRA: ranks of the layers, and the two forms of the adapter on disk.

    The native form holds the tensors that train. The stock form is an equivalent plain LoRA that every PEFT can load.
    For plain LoRA both are the same file.
    """

    section: LowRank

    @property
    @abstractmethod
    def layer(self) -> type[LowRankLinear]:
        """The class of adapted layers."""

    @property
    def kinds(self) -> frozenset[LayerKind]:
        """Kinds of layers that it adapts; PEFT's embedding layers know no other update than plain LoRA and DoRA."""
        return LINEAR_KINDS | {"embedding"} if self.layer is LowRankLinear else LINEAR_KINDS

    def violations(self, model: PreTrainedModel) -> Iterator[Violation]:
        """Names, tokens, ranks and rules of the section that fit no part of the base."""
        section = self.section
        yield from target_violations(model, section.target_modules, self.kinds)
        named = find_targets(model, section.target_modules, self.kinds).adapted
        yield from saved_module_violations(model, section.modules_to_save, named)
        if self.tokenizer is not None:
            yield from token_violations(
                model, section.trainable_tokens, self.tokenizer, "adapter.trainable_tokens", named
            )
        if self.new_ids:
            yield from new_token_violations(model, named, section.modules_to_save)
        yield from rule_violations(self.modules, model, named)
        yield from twice_trained_violations(model, section.target_modules, section.modules_to_save, self.kinds)
        yield from self._expert_violations(model)
        if named and not self._adapted(named):
            what = "no layer is left to adapt: modules skips them, or modules_to_save trains them in full"
            yield Violation("adapter.target_modules", what, "name other layers")

    def trains_experts(self, model: PreTrainedModel) -> bool:
        """Whether experts are adapted, or the targets are names of other layers."""
        targets = self.section.target_modules
        is_named = targets == ALL_LINEAR or any(targets_experts(target) for target in targets)
        return not is_named or bool(peft_bridge.expert_parameters(model, targets))

    def _expert_violations(self, model: PreTrainedModel) -> Iterator[Violation]:
        """Experts among the targets of a method that does not train them, or whose adapter would lack them."""
        experts = peft_bridge.expert_parameters(model, self.section.target_modules)
        if not experts:
            return
        hint = "name layers without experts, such as adapter.target_modules: [q_proj, k_proj, v_proj, o_proj]"
        what = f"the weights of experts ({', '.join(experts)}) are among the targets, and {{}} does not train them"
        if self.layer is not LowRankLinear:
            name = self.section.method if self.section.method != "lora" else "this form of lora"
            yield Violation("adapter.target_modules", what.format(name), f"{hint}; plain lora trains them")
        elif getattr(self.section, "dora", False):
            yield Violation("adapter.dora", what.format("dora"), f"leave it out, or {hint}")
        elif self.section.dropout:
            yield Violation("adapter.dropout", what.format("an adapter with dropout"), f"set it to 0, or {hint}")

    def _adapted(self, named: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Those of the named layers that no rule skips and that `modules_to_save` does not train in full."""
        saved = self.section.modules_to_save
        rules = {name: setting_for(self.modules, name, "adapter") for name in named}
        return {
            name: layer
            for name, layer in named.items()
            if not (rules[name] and rules[name].skip) and not any(is_within(name, entry) for entry in saved)
        }

    def note(self, model: PreTrainedModel) -> str | None:
        """The layers that are left out, and those that are tied."""
        return adaptation_note(model, self.section.target_modules, self.kinds)

    def attach(self, model: PreTrainedModel, total_steps: int) -> nn.Module:
        """Add an update of rank r to each target layer."""
        return peft_bridge.attach(model, self._config(linear_layers(model)), self.kinds)

    def load_initial_adapter(self, model: nn.Module, folder: Path) -> None:
        """Start from a saved adapter with the same tensors."""
        peft_bridge.load_initial_adapter(model, folder)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the adapter in stock form, and the native tensors beside it where they differ."""
        if self.layer is LowRankLinear:
            peft_bridge.save(model, folder)
        else:
            peft_bridge.save_as_lora(model, self._stock_config(peft_bridge.low_rank_layers(model)), folder)

    def load(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        """Load a saved adapter onto a base."""
        return peft_bridge.load(model, self._config(linear_layers(model)), folder, self.kinds)

    def detach(self, model: nn.Module) -> PreTrainedModel:
        """Drop the adapter."""
        return peft_bridge.unload(model)

    def mergeable(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        """Load the stock form; its merge W + (alpha / r) B A is exact up to rounding to W's dtype."""
        return peft_bridge.load_stock(model, self._stock_config(linear_layers(model)), folder, self.kinds)

    def _config(self, layers: Iterable[str]) -> LoraConfig:
        """The PEFT configuration of the native layers, for training and for loading by ft."""
        config = self._lora_config(layers)
        # PEFT then wraps target layers in our class. The registration is not saved: stock PEFT would not find it.
        config._register_custom_module(dict.fromkeys(LINEAR_TYPES, self.layer))
        return config

    def _stock_config(self, layers: Iterable[str]) -> LoraConfig:
        """The PEFT configuration of the stock form.

        Stock PEFT knows plain LoRA, rank stabilisation and DoRA. Methods with other formulas override this and save an
        equivalent plain LoRA, whose rank and alpha can differ from those of the recipe.
        """
        return self._lora_config(layers)

    def _lora_config(
        self, layers: Iterable[str], scale_rank: Callable[[int, float], tuple[int, float]] = _keep_rank
    ) -> LoraConfig:
        """LoRA on the recipe's target layers among `layers`.

        Args:
            layers: Names of all linear layers.
            scale_rank: Maps rank and alpha of the recipe to those of the configuration.
        """
        section = self.section
        ranks, alphas, skipped = {}, {}, []
        for name in layers:
            own = setting_for(self.modules, name, "adapter")
            if own is not None and own.skip:
                skipped.append(name)
            elif own is not None:
                ranks[name], alphas[name] = scale_rank(own.r or section.r, own.alpha or section.alpha)
        r, alpha = scale_rank(section.r, section.alpha)
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
        )

    def _trained_tokens(self) -> list[int]:
        named = peft_bridge.token_ids(self.section.trainable_tokens, self.tokenizer, "adapter.trainable_tokens")
        # Modules that train in full have the rows of new tokens too.
        return named if self.section.modules_to_save else merged_ids(named, self.new_ids)


class LoraMethod(LowRankMethod):
    """LoRA over full-precision or quantized layers, with rsLoRA, DoRA, PiSSA, OLoRA, LoftQ, LoRA+ and IEC."""

    weight_format = (
        "W x + s B A x, s = alpha / r or alpha / sqrt(r); iec: both factors after equation 16 of arXiv 2402.05445; "
        "pissa, olora: B A without its start; dora: rows scaled to learned lengths"
    )
    section: Lora

    @property
    def layer(self) -> type[LowRankLinear]:
        """The class of adapted layers."""
        if self.section.iec:
            return IecLinear
        return DifferenceLinear if self.section.initialization in ("pissa", "olora") else LowRankLinear

    def own_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Also the initial values of difference layers.

        They come from an SVD or QR decomposition, whose last bits depend on the number of threads.
        """
        starts = {name: parameter for name, parameter in model.named_parameters() if "lora_start_" in name}
        return {**super().own_tensors(model), **starts}

    def initialize(self, model: nn.Module, original: Callable[[str], Tensor]) -> None:
        """Initialize A and B from the base's weights (PiSSA, OLoRA) or its quantization error (LoftQ).

        Source: Meng et al. 2024 (PiSSA), arXiv 2404.02948; Büyükakyüz 2024 (OLoRA), arXiv 2406.01775; Li et al. 2023
        (LoftQ), arXiv 2310.08659, algorithm 1 with one alternation, since the base is quantized already.
        """
        for name, layer in peft_bridge.low_rank_layers(model).items():
            weight_OI = layer.base_weight()
            for adapter in layer.active_adapters:
                r, scaling = layer.r[adapter], layer.scaling[adapter]
                match self.section.initialization:
                    case "pissa":  # equations 2-3: B A, which counts `scaling` times, is the principal part of W
                        layer.start_from(adapter, principal(weight_OI / scaling, r))
                    case "olora":
                        layer.start_from(adapter, orthonormal(weight_OI, r))
                    # B A approximates the quantization error W - Q(W). Of an unquantized layer, such as the head,
                    # that is zero, and factors that both are zero have no gradient: it starts as in plain LoRA.
                    case "loftq" if is_quantized(layer.get_base_layer()):
                        # The file is read onto the CPU; the base may be on a GPU.
                        stored = original(name).to(weight_OI)
                        error_OI = (stored.T if layer.is_stored_transposed else stored) - weight_OI
                        layer.start_from(adapter, principal(error_OI / scaling, r))

    def violations(self, model: PreTrainedModel) -> Iterator[Violation]:
        """Also ranks that the initialization cannot have."""
        yield from super().violations(model)
        if self.section.initialization != "zero":
            named = find_targets(model, self.section.target_modules, LINEAR_KINDS).adapted
            layers = self._adapted(named)
            ranks = {name: self._rank_of(name) for name in layers}
            yield from rank_violations(ranks, layers, self.section.initialization)

    def _rank_of(self, layer: str) -> tuple[int, str]:
        """The rank of a layer, and the key that sets it."""
        for index, rule in enumerate(self.modules):
            if rule.adapter is not None and rule.matches(layer):
                return (
                    (rule.adapter.r, f"modules.{index}.adapter.r") if rule.adapter.r else (self.section.r, "adapter.r")
                )
        return self.section.r, "adapter.r"

    def lr_multiplier(self, parameter: str) -> float:
        """LoRA+: B learns faster than A. Source: Hayou et al. 2024, arXiv 2402.12354, section 5."""
        return self.section.loraplus_ratio if ".lora_B." in parameter else 1.0

    def _config(self, layers: Iterable[str]) -> LoraConfig:
        config = super()._config(layers)
        config.use_rslora, config.use_dora = self.section.rslora, self.section.dora
        return config

    def _stock_config(self, layers: Iterable[str]) -> LoraConfig:
        if self.layer is LowRankLinear:
            config = self._lora_config(layers)
            config.use_rslora, config.use_dora = self.section.rslora, self.section.dora
            return config
        return self._lora_config(layers, self._scale_stock_rank)

    def _scale_stock_rank(self, r: int, alpha: float) -> tuple[int, float]:
        """Rank and alpha of the equivalent plain LoRA, with the same scale s.

        A difference layer is s (B A - B0 A0), which as one product has rank 2 r: [B, -B0] [A; A0]. Stock PEFT computes
        s as alpha / rank, so alpha is s times the new rank.
        """
        rank = 2 * r if self.layer.subtracts_start else r
        return rank, alpha / (r**0.5 if self.section.rslora else r) * rank


def _short(alpha: float) -> float:
    """Alpha as an integer if possible: engines that serve adapters declare it as one."""
    return int(alpha) if float(alpha).is_integer() else alpha

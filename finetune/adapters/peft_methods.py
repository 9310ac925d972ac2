"""Methods that PEFT implements: the recipe's section is translated to PEFT's configuration."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from peft import IA3Config, LoHaConfig, LoKrConfig, OFTConfig, PeftConfig, TrainableTokensConfig, VeraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.adapters import peft_bridge
from finetune.adapters.base import AdapterMethod
from finetune.adapters.name_checks import new_token_violations, target_violations, token_violations
from finetune.adapters.targets import adaptation_note, find_targets
from finetune.adapters.token_rows import merged_ids
from finetune.errors import UnsupportedError
from finetune.models.linear_layers import LINEAR_KINDS, LayerKind, shape_of
from finetune.recipe.rules.violation import Violation


class PeftMethod(AdapterMethod):
    """Base of these methods; subclasses supply the configuration."""

    kinds: ClassVar[frozenset[LayerKind]] = LINEAR_KINDS
    """Kinds of layers that PEFT implements the method for."""

    def violations(self, model: PreTrainedModel) -> Iterator[Violation]:
        """Names of no layer that the method adapts."""
        yield from target_violations(model, self.section.target_modules, self.kinds)

    def note(self, model: PreTrainedModel) -> str | None:
        """The layers that are left out, and those that are tied."""
        return adaptation_note(model, self.section.target_modules, self.kinds)

    def attach(self, model: PreTrainedModel, total_steps: int) -> nn.Module:
        """Wrap the target layers."""
        return peft_bridge.attach(model, self.config(), self.kinds)

    def load_initial_adapter(self, model: nn.Module, folder: Path) -> None:
        """Start from a saved adapter with the same tensors."""
        peft_bridge.load_initial_adapter(model, folder)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the adapter as stock PEFT reads it."""
        peft_bridge.save(model, folder)

    def load(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        """Load a saved adapter onto a base."""
        return peft_bridge.load(model, self.config(), folder, self.kinds)

    def detach(self, model: nn.Module) -> PreTrainedModel:
        """Drop the adapter."""
        return peft_bridge.unload(model)

    def mergeable(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        """Load the adapter to be merged into the weights, which is exact up to rounding to their dtype."""
        return peft_bridge.load_stock(model, self.config(), folder, self.kinds)

    @abstractmethod
    def config(self) -> PeftConfig:
        """PEFT's configuration."""

    def _targets(self) -> dict[str, Any]:
        return {"task_type": "CAUSAL_LM", "target_modules": peft_bridge.as_targets(self.section.target_modules)}


class VeraMethod(PeftMethod):
    """VeRA: two vectors per layer around random matrices that all layers share.

    Source: Kopiczko et al. 2024, arXiv 2310.11454, equation 2.
    """

    weight_format = "W x + b * (B (d * (A x))), A and B as saved"

    def config(self) -> VeraConfig:
        """The shared matrices are saved with the adapter: a random generator may change between versions."""
        section = self.section
        return VeraConfig(
            r=section.r,
            d_initial=section.initial,
            vera_dropout=section.dropout,
            projection_prng_key=section.projection_seed,
            save_projection=True,
            **self._targets(),
        )

    def own_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Also the shared matrices, for the same reason."""
        shared = {name: buffer for name, buffer in model.named_buffers() if ".vera_A." in name or ".vera_B." in name}
        return {**super().own_tensors(model), **shared}


class Ia3Method(PeftMethod):
    """(IA)3: a learned factor for each output of a layer, or for each input of a feed-forward layer.

    Source: Liu et al. 2022, arXiv 2205.05638, section 3.3.
    """

    weight_format = "l * W x, W (l * x) in feed-forward layers"

    def config(self) -> IA3Config:
        """(IA)3 on the recipe's layers; `feedforward_modules` scale inputs instead of outputs."""
        return IA3Config(feedforward_modules=list(self.section.feedforward_modules), **self._targets())


class LoHaMethod(PeftMethod):
    """LoHa: the entrywise product of two low-rank matrices, of rank up to r squared.

    Source: Hyeon-Woo et al. 2022 (FedPara), arXiv 2108.06098, proposition 1.
    """

    weight_format = "(W + (alpha / r) (B1 A1) * (B2 A2)) x"
    kinds = frozenset[LayerKind]({"linear"})

    def config(self) -> LoHaConfig:
        """LoHa on the recipe's layers."""
        section = self.section
        return LoHaConfig(r=section.r, alpha=section.alpha, module_dropout=section.module_dropout, **self._targets())


class LoKrMethod(PeftMethod):
    """LoKr: a Kronecker product, its larger factor of low rank.

    Source: Yeh et al. 2024 (LyCORIS), arXiv 2309.14859, section 3.2.
    """

    weight_format = "(W + (alpha / r) C kron (B A)) x"
    kinds = frozenset[LayerKind]({"linear"})

    def config(self) -> LoKrConfig:
        """LoKr on the recipe's layers."""
        section = self.section
        return LoKrConfig(r=section.r, alpha=section.alpha, module_dropout=section.module_dropout, **self._targets())


class OftMethod(PeftMethod):
    """OFT: the inputs of a layer rotated in blocks, which keeps the angles between neurons.

    Source: Qiu et al. 2023, arXiv 2306.07280, equation 4 (the exact Cayley transform).
    """

    weight_format = "W R x, R orthogonal in blocks"
    kinds = frozenset[LayerKind]({"linear"})

    def violations(self, model: PreTrainedModel) -> Iterator[Violation]:
        """Also layers whose inputs are not whole blocks: PEFT would reduce their block size."""
        yield from super().violations(model)
        if (violation := self._partial_block(model)) is not None:
            yield violation

    def attach(self, model: PreTrainedModel, total_steps: int) -> nn.Module:
        """Wrap the target layers.

        Raises:
            UnsupportedError: The block size does not divide the input width of some layer.
        """
        if (violation := self._partial_block(model)) is not None:
            raise UnsupportedError(violation.what, where=violation.key, hint=violation.hint)
        return super().attach(model, total_steps)

    def _partial_block(self, model: PreTrainedModel) -> Violation | None:
        """A violation for the first layer with a partial block of inputs."""
        size = self.section.block_size
        for name, layer in find_targets(model, self.section.target_modules, self.kinds).adapted.items():
            _, in_features = shape_of(layer)
            if in_features % size:
                what = f"{name} has {in_features} inputs, not a multiple of {size}"
                hint = "choose a size that divides every layer's inputs, such as 32"
                return Violation("adapter.block_size", what, hint)
        return None

    def config(self) -> OFTConfig:
        """OFT on the recipe's layers; the number of blocks (PEFT's `r`) follows from the block size."""
        section = self.section
        return OFTConfig(
            r=0,
            oft_block_size=section.block_size,
            module_dropout=section.module_dropout,
            use_cayley_neumann=False,
            **self._targets(),
        )


class TrainableTokensMethod(PeftMethod):
    """New rows for some tokens, in the embeddings and an untied output head; only these rows are copied."""

    weight_format = "embeddings of the named tokens replaced"

    def violations(self, model: PreTrainedModel) -> Iterator[Violation]:
        """Texts that are not a token."""
        if self.tokenizer is not None:
            yield from token_violations(model, self.section.tokens, self.tokenizer, "adapter.tokens")
        if self.new_ids:
            yield from new_token_violations(model)

    def note(self, model: PreTrainedModel) -> str | None:
        """None: no layers are chosen by name."""
        return None

    def attach(self, model: PreTrainedModel, total_steps: int) -> nn.Module:
        """Wrap the embeddings and the output head."""
        return peft_bridge.attach(model, self.config())

    def config(self) -> TrainableTokensConfig:
        """PEFT finds the embeddings itself."""
        ids = peft_bridge.token_ids(self.section.tokens, self.tokenizer, "adapter.tokens")
        return TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=merged_ids(ids, self.new_ids))

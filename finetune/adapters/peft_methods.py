"""Methods that PEFT implements: the recipe's section is translated to PEFT's configuration."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

from peft import IA3Config, LoHaConfig, LoKrConfig, OFTConfig, PeftConfig, TrainableTokensConfig, VeraConfig
from peft.tuners.oft.layer import OFTLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.adapters import peft_bridge
from finetune.adapters.base import AdapterMethod
from finetune.errors import UnsupportedError


class PeftMethod(AdapterMethod):
    """Base of these methods; subclasses supply the configuration."""

    def attach(self, model: PreTrainedModel, total_steps: int) -> nn.Module:
        """Wrap the target layers."""
        return peft_bridge.attach(model, self.config(), self.section.target_modules)

    def load_initial_adapter(self, model: nn.Module, folder: Path) -> None:
        """Start from a saved adapter with the same tensors."""
        peft_bridge.load_initial_adapter(model, folder)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the adapter as stock PEFT reads it."""
        peft_bridge.save(model, folder)

    def load(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        """Load a saved adapter onto a base."""
        return peft_bridge.load(model, self.config(), folder)

    def detach(self, model: nn.Module) -> PreTrainedModel:
        """Drop the adapter."""
        return peft_bridge.unload(model)

    def mergeable(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        """Load the adapter to be merged into the weights, which is exact up to rounding to their dtype."""
        return peft_bridge.load_stock(model, self.config(), folder)

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

    def config(self) -> LoHaConfig:
        """LoHa on the recipe's layers."""
        section = self.section
        return LoHaConfig(r=section.r, alpha=section.alpha, module_dropout=section.module_dropout, **self._targets())


class LoKrMethod(PeftMethod):
    """LoKr: a Kronecker product, its larger factor of low rank.

    Source: Yeh et al. 2024 (LyCORIS), arXiv 2309.14859, section 3.2.
    """

    weight_format = "(W + (alpha / r) C kron (B A)) x"

    def config(self) -> LoKrConfig:
        """LoKr on the recipe's layers."""
        section = self.section
        return LoKrConfig(r=section.r, alpha=section.alpha, module_dropout=section.module_dropout, **self._targets())


class OftMethod(PeftMethod):
    """OFT: the inputs of a layer rotated in blocks, which keeps the angles between neurons.

    Source: Qiu et al. 2023, arXiv 2306.07280, equation 4 (the exact Cayley transform).
    """

    weight_format = "W R x, R orthogonal in blocks"

    def attach(self, model: PreTrainedModel, total_steps: int) -> nn.Module:
        """Wrap the target layers.

        Raises:
            UnsupportedError: The block size does not divide the input width of some layer.
        """
        wrapped = super().attach(model, total_steps)
        # PEFT would reduce the block size of such a layer, with only a warning.
        for name, layer in wrapped.named_modules():
            if isinstance(layer, OFTLayer) and layer.in_features % self.section.block_size:
                raise UnsupportedError(
                    f"{name.removeprefix(peft_bridge.PREFIX)} has {layer.in_features} inputs, not a multiple of it",
                    where="adapter.block_size",
                    hint="choose a block size that divides every layer's inputs, such as 32",
                )
        return wrapped

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
    """New embeddings for some tokens; only their rows are copied, not the whole embedding matrix."""

    weight_format = "embeddings of the named tokens replaced"

    def attach(self, model: PreTrainedModel, total_steps: int) -> nn.Module:
        """Wrap the embeddings, and the output head if it is tied to them."""
        return peft_bridge.attach(model, self.config(), "the embeddings")

    def config(self) -> TrainableTokensConfig:
        """PEFT finds the embeddings itself."""
        ids = peft_bridge.token_ids(self.section.tokens, self.tokenizer, "adapter.tokens")
        return TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=ids)

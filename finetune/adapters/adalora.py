"""AdaLoRA: y = W x + (alpha / r) B (E o A) x, with ranks allocated to the layers by importance.

W is frozen, A has the shape (r, in), B (out, r), E (r, 1); E starts at 0. A triplet is a row of A, an entry of E and a
column of B. During training the least important triplets are pruned until the mean rank is the target rank.

Source: Zhang et al. 2023, arXiv 2303.10512. As in the authors' code, A and B start normal with standard deviation
0.02, the scale stays alpha over the first rank, and weight decay shrinks E as it does A and B.

PEFT's own AdaLoRA is not used: it does not accept the quantized layers of ft, and it adds its penalty to evaluation
losses. The saved adapter is a plain LoRA.

Shape legend: O out_features, I in_features, R first rank of a layer, `...` any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.adapters import peft_bridge
from finetune.adapters.base import check_same_tensors
from finetune.adapters.lora import LowRankMethod
from finetune.adapters.low_rank import Factors, LowRankLinear
from finetune.adapters.rank_allocation import Budget, RankAllocator, Triplets
from finetune.errors import RefusedError, UnsupportedError
from finetune.models.linear_layers import linear_layers
from finetune.recipe.sections.adapter import AdaLora


class AdaLoraLinear(LowRankLinear):
    """y = W x + s B (E o A) x over a full-precision or quantized W.

    Source: Zhang et al. 2023, arXiv 2303.10512, section 3.1, with P = B, Lambda = diag(E), Q = A.
    """

    adapter_layer_names = (*LowRankLinear.adapter_layer_names, "lora_E")

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **settings: Any) -> None:
        """Add an adapter; E starts at zero, so the output is unchanged."""
        if not hasattr(self, "lora_E"):
            self.lora_E = nn.ParameterDict({})
        super().update_layer(adapter_name, r, lora_alpha, config, **settings)
        a, b = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        # E = 0 makes the update zero, so neither A nor B has to be: both get gradients from the penalty at once.
        nn.init.normal_(a, std=0.02)
        nn.init.normal_(b, std=0.02)
        self.lora_E[adapter_name] = nn.Parameter(torch.zeros(r, 1, device=a.device))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _terms(self, adapter: str) -> list[Factors]:
        """E o A and B with every triplet: pruned ones still get gradients, and may return."""
        a_RI, e_R1, b_OR = self.triplets(adapter)
        return [Factors(e_R1 * a_RI, b_OR)]

    def triplets(self, adapter: str) -> Triplets:
        """The trainable factors."""
        return Triplets(self.lora_A[adapter].weight, self.lora_E[adapter], self.lora_B[adapter].weight)

    def factors(self, adapter: str) -> Factors:
        """The equivalent plain LoRA: E o A and B without the pruned triplets (E = 0)."""
        a_RI, e_R1, b_OR = self.triplets(adapter)
        kept_R = e_R1[:, 0] != 0
        return Factors((e_R1 * a_RI)[kept_R], b_OR[:, kept_R])


class AdaLoraMethod(LowRankMethod):
    """AdaLoRA over full-precision or quantized layers.

    Attributes:
        allocator: Allocates ranks during training; created by `attach`.
    """

    weight_format = "W x + (alpha / r) B (E o A) x, r being the rank that was started with"
    section: AdaLora
    allocator: RankAllocator

    @property
    def layer(self) -> type[LowRankLinear]:
        """The AdaLoRA layer."""
        return AdaLoraLinear

    def attach(self, model: PreTrainedModel, total_steps: int) -> nn.Module:
        """Add an update of the initial rank to each target layer, and create the budget of ranks.

        Raises:
            UnsupportedError: The run has too few steps for the schedule, or the initial ranks from `modules` are not
                more than the final budget.
        """
        if lack := self.section.lack_of_steps(total_steps):
            raise UnsupportedError(
                lack,
                where="adapter.final_steps",
                hint="train for longer, or lower adapter.initial_steps or adapter.final_steps",
            )
        attached = super().attach(model, total_steps)
        updated = peft_bridge.low_rank_layers(attached)
        layers = {name: layer.triplets(peft_bridge.ADAPTER_NAME) for name, layer in updated.items()}
        self.allocator = RankAllocator(
            layers, self._budget(layers, total_steps), self.section.sensitivity_decay, self.section.uncertainty_decay
        )
        return attached

    def penalty(self, model: nn.Module) -> Tensor:
        """Orthogonality penalty: gamma times the mean of |A A^T - I|_F and |B^T B - I|_F over all layers; a scalar.

        Source: section 3.1, equation 4, which sums squared norms. The authors' code takes the mean of norms that are
        not squared, and published values of gamma belong to that; so does this.
        """
        grams_RR = [
            gram_RR for a_RI, _, b_OR in self.allocator.layers.values() for gram_RR in (a_RI @ a_RI.T, b_OR.T @ b_OR)
        ]
        norms = [torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)) for gram in grams_RR]
        return self.section.orthogonal_weight * torch.stack(norms).mean()

    def after_step(self, model: nn.Module, step: int) -> None:
        """Update the scores; reallocate ranks if due."""
        self.allocator.after_step(step)

    def ranks(self, model: nn.Module) -> dict[str, int]:
        """The current rank of each layer."""
        return self.allocator.ranks()

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a plain LoRA of uniform rank, which all engines read, and the AdaLoRA factors beside it."""
        layers = peft_bridge.low_rank_layers(model)
        # At least 1: PEFT accepts no rank of 0, even if every triplet was pruned.
        rank = max(1, *(len(layer.factors(peft_bridge.ADAPTER_NAME).a_RI) for layer in layers.values()))
        peft_bridge.save_as_lora(model, self._one_rank(layers, rank), folder, rank)

    def mergeable(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        """Load the plain LoRA that `save` wrote, ready to merge into W."""
        config = self._one_rank(linear_layers(model), peft_bridge.stock_rank(folder))
        return peft_bridge.load_stock(model, config, folder, self.kinds)

    def _one_rank(self, layers: Iterable[str], rank: int) -> LoraConfig:
        """The PEFT configuration of a plain LoRA with this rank and scale 1 in every layer."""
        # alpha = r gives scale 1: `save_as_lora` multiplies the real scale into B.
        config = self._lora_config(layers, lambda r, alpha: (rank, rank))
        config.rank_pattern, config.alpha_pattern = {}, {}
        return config

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The factors at their initial rank, the smoothed scores, the kept triplets, and the budget."""
        return super().state(model) | self.allocator.tensors()

    @torch.no_grad()
    def restore(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state.

        Raises:
            RefusedError: A tensor is missing, left over or of another shape, or the budget has another schedule now.
        """
        own = self.allocator.tensors()
        saved = {name: tensor for name, tensor in tensors.items() if name in own}
        check_same_tensors(saved, own)
        if not torch.equal(saved["budget"], own["budget"]):
            raise RefusedError(
                "ranks are allocated by another budget than in the checkpoint: the budget depends on the length of the "
                "run, the number of layers, and the section adapter",
                hint="resume with the recipe that the run was started with",
            )
        super().restore(model, {name: tensor for name, tensor in tensors.items() if name not in own})
        for name, tensor in own.items():
            tensor.copy_(saved[name])

    def _budget(self, layers: Mapping[str, Triplets], total_steps: int) -> Budget:
        first, last = sum(len(factors.e_R1) for factors in layers.values()), self.section.target_r * len(layers)
        if last >= first:
            raise UnsupportedError(
                f"with modules, the layers start with {first} ranks in total, and {last} are to remain",
                where="adapter.target_r",
                hint="lower it, or raise adapter.r in modules",
            )
        phases = self.section.phases(total_steps)
        # About a hundred allocations, if the recipe does not say.
        every = self.section.allocate_every or max(1, round(phases.falling / 100))
        return Budget(first, last, phases.initial, phases.falling, every)

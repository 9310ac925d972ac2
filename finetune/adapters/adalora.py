"""AdaLoRA: y = W x + (alpha / r) B (E o A) x, whose ranks move to the layers where they matter most.

W is frozen, A has the shape (r, in), B (out, r), E (r, 1); E = 0 at first. While training, triplets of a row of A, a
number of E and a column of B are taken from the layers that need them least, until the mean rank is the wanted one.

Source: Zhang et al. 2023, arXiv 2303.10512. As in the authors' code, A and B start normal with standard deviation
0.02, the scale stays alpha over the first rank, and weight decay shrinks E as it does A and B.

The layer is ours and not PEFT's, whose AdaLoRA takes no quantized layer of ours and adds its penalty to evaluation
losses; what is saved is a plain LoRA.

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
from finetune.adapters.base import refuse_strangers
from finetune.adapters.lora import LowRankMethod
from finetune.adapters.low_rank import Factors, LowRankLinear
from finetune.adapters.rank_allocation import Budget, RankAllocator, Triplets
from finetune.errors import RefusedError, UnsupportedError
from finetune.models.linear_layers import linear_layers
from finetune.recipe.sections.adapter import AdaLora


class AdaLoraLinear(LowRankLinear):
    """y = W x + s B (E o A) x, whatever stores W.

    Source: Zhang et al. 2023, arXiv 2303.10512, section 3.1, with P = B, Lambda = diag(E), Q = A.
    """

    adapter_layer_names = (*LowRankLinear.adapter_layer_names, "lora_E")

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **settings: Any) -> None:
        """Add an adapter; E starts at zero, so that it changes nothing."""
        if not hasattr(self, "lora_E"):
            self.lora_E = nn.ParameterDict({})
        super().update_layer(adapter_name, r, lora_alpha, config, **settings)
        a, b = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        nn.init.normal_(a, std=0.02)
        nn.init.normal_(b, std=0.02)
        self.lora_E[adapter_name] = nn.Parameter(torch.zeros(r, 1, device=a.device))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _parts(self, adapter: str) -> list[Factors]:
        """E o A and B, with every triplet: those of the value zero have gradients too."""
        a_RI, e_R1, b_OR = self.triplets(adapter)
        return [Factors(e_R1 * a_RI, b_OR)]

    def triplets(self, adapter: str) -> Triplets:
        """The trainable factors."""
        return Triplets(self.lora_A[adapter].weight, self.lora_E[adapter], self.lora_B[adapter].weight)

    def factors(self, adapter: str) -> Factors:
        """The plain LoRA that this adapter is: E o A and B, without the triplets whose singular value is zero."""
        a_RI, e_R1, b_OR = self.triplets(adapter)
        kept_R = e_R1[:, 0] != 0
        return Factors((e_R1 * a_RI)[kept_R], b_OR[:, kept_R])


class AdaLoraMethod(LowRankMethod):
    """AdaLoRA over full-precision or quantized layers.

    Attributes:
        allocator: Chooses ranks while training; made by `attach`.
    """

    convention = "W x + (alpha / r) B (E o A) x, r being the rank that was started with"
    section: AdaLora
    allocator: RankAllocator

    @property
    def layer(self) -> type[LowRankLinear]:
        """The layer of B (E o A)."""
        return AdaLoraLinear

    def attach(self, model: PreTrainedModel, total_steps: int) -> nn.Module:
        """Add an update of the first rank beside each target layer, and lay out the budget.

        Raises:
            UnsupportedError: The steps are too few to choose ranks in, or `modules` starts with fewer ranks than the
                budget ends with.
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
        """Gamma times the mean of |A A^T - I| and |B^T B - I| over all layers: how far vectors are from orthogonal.

        Source: section 3.1, equation 4, which sums squared norms; as in the authors' code, norms are not squared and
        their mean is taken, and the usual gamma is for that.
        """
        grams_RR = [
            gram_RR for a_RI, _, b_OR in self.allocator.layers.values() for gram_RR in (a_RI @ a_RI.T, b_OR.T @ b_OR)
        ]
        norms = [torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)) for gram in grams_RR]
        return self.section.orthogonal_weight * torch.stack(norms).mean()

    def after_step(self, model: nn.Module, step: int) -> None:
        """Score, and choose ranks where it is time."""
        self.allocator.after_step(step)

    def ranks(self, model: nn.Module) -> dict[str, int]:
        """What each layer has been given so far."""
        return self.allocator.ranks()

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a plain LoRA of one rank, which all engines read, and beside it the factors as they are."""
        layers = peft_bridge.low_rank_layers(model)
        rank = max(1, *(len(layer.factors(peft_bridge.ADAPTER_NAME).a_RI) for layer in layers.values()))
        peft_bridge.save_as_lora(model, self._one_rank(layers, rank), folder, rank)

    def mergeable(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        """Add the plain LoRA that `save` wrote to W."""
        config = self._one_rank(linear_layers(model), peft_bridge.stock_rank(folder))
        return peft_bridge.load_stock(model, config, folder)

    def _one_rank(self, layers: Iterable[str], rank: int) -> LoraConfig:
        """The configuration of a plain LoRA of this rank and the scale 1 everywhere."""
        config = self._lora_config(layers, lambda r, alpha: (rank, rank))
        config.rank_pattern, config.alpha_pattern = {}, {}
        return config

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The factors at their first rank, the smoothed scores, which triplets stay, and the budget."""
        return super().state(model) | self.allocator.tensors()

    @torch.no_grad()
    def restore(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Put all of it back.

        Raises:
            RefusedError: A tensor is missing, left over or of another shape, or the budget has another course now.
        """
        own = self.allocator.tensors()
        saved = {name: tensor for name, tensor in tensors.items() if name in own}
        refuse_strangers(saved, own)
        if not torch.equal(saved["budget"], own["budget"]):
            raise RefusedError(
                "ranks are chosen by another budget than in the checkpoint: its course follows from the length of the "
                "run, the number of layers, and the section adapter",
                hint="go on with the recipe that the run was started with",
            )
        super().restore(model, {name: tensor for name, tensor in tensors.items() if name not in own})
        for name, tensor in own.items():
            tensor.copy_(saved[name])

    def _budget(self, layers: Mapping[str, Triplets], total_steps: int) -> Budget:
        first, last = sum(len(factors.e_R1) for factors in layers.values()), self.section.target_r * len(layers)
        if last >= first:
            raise UnsupportedError(
                f"the layers start with {first} ranks by what modules says, and {last} are to remain",
                where="adapter.target_r",
                hint="lower it, or raise adapter.r in modules",
            )
        phases = self.section.phases(total_steps)
        every = self.section.allocate_every or max(1, round(phases.falling / 100))
        return Budget(first, last, phases.initial, phases.falling, every)

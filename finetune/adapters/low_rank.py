"""A low-rank update beside a frozen linear layer, in the forms of LoRA, QA-LoRA and IR-QLoRA.

Shape legend: O out_features, I in_features, R rank, K inputs that are pooled, L = I / K pooled inputs,
`...` any leading dimensions.
"""

from __future__ import annotations

from math import gcd
from typing import Any, ClassVar, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finetune.errors import UnsupportedError
from finetune.quantizers.base import Capabilities, is_quantized


class Factors(NamedTuple):
    """The two matrices whose product, scaled, is the update of a weight: `b_OR @ a_RI`."""

    a_RI: Tensor
    b_OR: Tensor


class LowRankLinear(lora.Linear):
    """y = W x + s B A x, whatever stores W.

    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.
    """

    adapter_layer_names = (*lora.Linear.adapter_layer_names, "lora_beta")
    pooled: ClassVar[bool] = False
    """Whether A sees sums over the groups that the base's quantizer has (QA-LoRA)."""
    elastic: ClassVar[bool] = False
    """Whether means of input and bottleneck go around A and B (IR-QLoRA's IEC)."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **settings: Any) -> None:
        self.pooled_inputs = _group_size(base_layer, settings.get("target_name", "")) if self.pooled else 1
        super().__init__(base_layer, adapter_name, config, **settings)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        in_features, out_features = super()._get_in_out_features(module)
        return in_features // self.pooled_inputs, out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **settings: Any) -> None:
        """Add an adapter; B and the betas start at zero, so that it changes nothing.

        A pooled A starts as the plain LoRA that it stands for would, by all I inputs and not by L.
        """
        if not hasattr(self, "lora_beta"):
            self.lora_beta = nn.ParameterDict({})
        super().update_layer(adapter_name, r, lora_alpha, config, **settings)
        if self.pooled_inputs > 1:
            with torch.no_grad():
                self.lora_A[adapter_name].weight.div_(self.pooled_inputs**0.5)
        if self.elastic:
            self.lora_beta[adapter_name] = nn.Parameter(torch.zeros(2, device=self.lora_A[adapter_name].weight.device))
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The product with W and every active update, in the type of the base's product; (..., I) -> (..., O)."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                result = result + self.update(adapter, x).to(result.dtype)
        return result

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """S B A x of one adapter, (..., I) -> (..., O), in float32 or autocast's type.

        Pooled: A sees the sum over each group of K inputs. Elastic: u = A x + beta1 up(mean(x)) and
        s (B u + beta2 up(mean(u))), where mean and up go over as many equal parts as both widths have.

        Source: Xu et al. 2024, arXiv 2309.14717, algorithm 1; Qin et al. 2024, arXiv 2402.05445, equations 13-16,
        means repeated element by element as in equation 16.
        """
        a, b = self.lora_A[adapter], self.lora_B[adapter]
        x = self._cast_input_dtype(x, a.weight.dtype)
        seen = self._pool(self.lora_dropout[adapter](x))
        if not self.elastic:
            return b(a(seen)) * self.scaling[adapter]
        beta1, beta2 = self.lora_beta[adapter]
        inner = a(seen) + beta1 * _spread_mean(self._pool(x), a.out_features)
        return (b(inner) + beta2 * _spread_mean(inner, b.out_features)) * self.scaling[adapter]

    def factors(self, adapter: str) -> Factors:
        """The plain LoRA that this adapter is: elastic paths folded in, a pooled A repeated over its groups."""
        a, b = self.pooled_factors(adapter)
        return Factors(a.repeat_interleave(self.pooled_inputs, dim=1), b)

    def pooled_factors(self, adapter: str) -> Factors:
        """The same with A of shape (R, L).

        Source: Qin et al. 2024, arXiv 2402.05445, equation 16.
        """
        a_RL, b_OR = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        if self.elastic:
            beta1, beta2 = self.lora_beta[adapter]
            a_RL = a_RL + beta1 * _mean_pattern(a_RL.shape[0], a_RL.shape[1], a_RL)
            b_OR = b_OR + beta2 * _mean_pattern(b_OR.shape[0], b_OR.shape[1], b_OR)
        return Factors(a_RL, b_OR)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to W, in its orientation."""
        a_RI, b_OR = self.factors(adapter)
        delta_OI = b_OR @ a_RI * self.scaling[adapter]
        return delta_OI.T if self.fan_in_fan_out else delta_OI

    def _pool(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.pooled_inputs)).sum(-1) if self.pooled_inputs > 1 else x


class PooledLinear(LowRankLinear):
    """QA-LoRA's update: constant within each group of the base's quantizer."""

    pooled = True


class ElasticLinear(LowRankLinear):
    """IR-QLoRA's update."""

    elastic = True


class PooledElasticLinear(LowRankLinear):
    """Both: the elastic path starts at the pooled input, so that the update stays constant within groups."""

    pooled = True
    elastic = True


def layer_class(*, pooled: bool, elastic: bool) -> type[LowRankLinear]:
    """The layer of these properties."""
    kinds = (LowRankLinear, PooledLinear, ElasticLinear, PooledElasticLinear)
    return next(kind for kind in kinds if (kind.pooled, kind.elastic) == (pooled, elastic))


def _group_size(base_layer: nn.Module, name: str) -> int:
    """Inputs that share a minimum in the stored base, where minimums can take up a constant."""
    while isinstance(base_layer, BaseTunerLayer):
        base_layer = base_layer.base_layer
    stored = base_layer.quantizer.capabilities if is_quantized(base_layer) else Capabilities()
    if not stored.float_zero_points or stored.group_size is None:
        raise UnsupportedError(
            f"QA-LoRA needs groups with float minimums, which the layer {name} does not have",
            where="adapter.method",
            hint="set quantization.kind to affine, hqq or optq, name a model that is quantized so, "
            "or leave the layer out in adapter.target_modules",
        )
    return stored.group_size


def _spread_mean(x: Tensor, width: int) -> Tensor:
    """Means over equal contiguous parts of the last dimension, each repeated, up to `width` numbers."""
    parts = gcd(x.shape[-1], width)
    return x.unflatten(-1, (parts, -1)).mean(-1).repeat_interleave(width // parts, dim=-1)


def _mean_pattern(rows: int, columns: int, like: Tensor) -> Tensor:
    """The matrix of `_spread_mean` from `columns` to `rows` numbers, shape (rows, columns)."""
    parts = gcd(rows, columns)
    block = torch.full((rows // parts, columns // parts), parts / columns, dtype=like.dtype, device=like.device)
    return torch.block_diag(*[block] * parts)

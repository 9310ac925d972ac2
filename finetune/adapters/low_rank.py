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

from finetune.adapters.lora_linear import LoraTerm, is_one_step, lora_linear, lora_update_reference
from finetune.errors import UnsupportedError
from finetune.models.fsdp import is_sharded_tensor, unsharded_weights
from finetune.quantizers.base import Capabilities, is_quantized


class Factors(NamedTuple):
    """The two matrices whose product, scaled, is the update of a weight: `b_OR @ a_RI`."""

    a_RI: Tensor
    b_OR: Tensor


class Magnitude(nn.Module):
    """The length of each row of an adapted weight, shape (O,): what DoRA trains beside the direction."""

    def __init__(self, lengths_O: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(lengths_O)


class LowRankLinear(lora.Linear):
    """y = W x + s B A x, whatever stores W.

    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.
    """

    adapter_layer_names = (*lora.Linear.adapter_layer_names, "lora_beta")
    pooled: ClassVar[bool] = False
    """Whether A sees sums over the groups that the base's quantizer has (QA-LoRA)."""
    elastic: ClassVar[bool] = False
    """Whether means of input and bottleneck go around A and B (IR-QLoRA's IEC)."""
    anchored: ClassVar[bool] = False
    """Whether A and B start at values that the update takes off again (PiSSA, OLoRA)."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **settings: Any) -> None:
        self.pooled_inputs = _group_size(base_layer, settings.get("target_name", "")) if self.pooled else 1
        self.base_row_norms: dict[str, Tensor] = {}
        super().__init__(base_layer, adapter_name, config, **settings)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        in_features, out_features = super()._get_in_out_features(module)
        return in_features // self.pooled_inputs, out_features

    def resolve_lora_variant(self, *, config: LoraConfig, **settings: Any) -> None:
        """None of PEFT's: what differs from plain LoRA stands below, and works over quantized weights too."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **settings: Any) -> None:
        """Add an adapter; B and the betas start at zero, so that it changes nothing.

        A pooled A starts as the plain LoRA that it stands for would, by all I inputs and not by L.
        """
        if not hasattr(self, "lora_beta"):
            self.lora_beta = nn.ParameterDict({})
            self.lora_start_A, self.lora_start_B = nn.ParameterDict({}), nn.ParameterDict({})
        super().update_layer(adapter_name, r, lora_alpha, config, **settings)
        device = self.lora_A[adapter_name].weight.device
        if self.pooled_inputs > 1:
            with torch.no_grad():
                self.lora_A[adapter_name].weight.div_(self.pooled_inputs**0.5)
        if self.elastic:
            self.lora_beta[adapter_name] = nn.Parameter(torch.zeros(2, device=device))
        if self.anchored:
            # In float32 from the first: PEFT widens what has 16 bits into new parameters, and those would train.
            for start, factor in ((self.lora_start_A, self.lora_A), (self.lora_start_B, self.lora_B)):
                values = torch.zeros_like(factor[adapter_name].weight, dtype=torch.float32)
                start[adapter_name] = nn.Parameter(values, requires_grad=False)
        if config.use_dora:
            self.lora_magnitude_vector[adapter_name] = Magnitude(self._row_norms(adapter_name))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def start_from(self, adapter: str, factors: Factors) -> None:
        """Give A and B other starting values than Kaiming-uniform and zero; their product counts s times.

        An anchored layer takes them off again, so that it starts as W does. The papers take them off W instead: the
        same map, but the base would not stay as it is, and a quantized one could not take it.
        """
        for factor, start, value in (
            (self.lora_A, self.lora_start_A, factors.a_RI),
            (self.lora_B, self.lora_start_B, factors.b_OR),
        ):
            factor[adapter].weight.copy_(value)
            if self.anchored:
                start[adapter].copy_(value)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The product with W and every active update, in the type of the base's product; (..., I) -> (..., O)."""
        adapters = self._adapters_in_use()
        if len(adapters) == 1 and torch.is_grad_enabled() and self._is_one_step(adapters[0]):
            product = lora_linear(x, self._input_of_update(adapters[0], x), self.branch(adapters[0]))
            return self._to_norm(adapters[0], product)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for adapter in adapters:
            result = self._to_norm(adapter, result + self.update(adapter, x).to(result.dtype))
        return result

    def _adapters_in_use(self) -> list[str]:
        if self.disable_adapters or self.merged:
            return []
        return [adapter for adapter in self.active_adapters if adapter in self.lora_A]

    def _to_norm(self, adapter: str, product: Tensor) -> Tensor:
        """What DoRA makes of (W + s B A) x: m (W + s B A) x / |W + s B A| by rows, the lengths taken as constants.

        Source: Liu et al. 2024, arXiv 2402.09353, equations 5 and 11.
        """
        if adapter not in self.lora_magnitude_vector:
            return product
        scale_O = (self.lora_magnitude_vector[adapter].weight / self._row_norms(adapter)).to(product.dtype)
        bias = self.get_base_layer().bias
        return product * scale_O if bias is None else (product - bias) * scale_O + bias

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """The product s B A x of one adapter, (..., I) -> (..., O), in the type of x.

        Pooled: A sees the sum over each group of K inputs. Elastic: u = A x + beta1 up(mean(x)) and
        s (B u + beta2 up(mean(u))), where mean and up go over as many equal parts as both widths have: A and B with the
        means of equation 16 folded in. Dropout leaves means alone, and what an anchored layer takes off again.

        Source: Xu et al. 2024, arXiv 2309.14717, algorithm 1; Qin et al. 2024, arXiv 2402.05445, equations 13-16,
        means repeated element by element as in equation 16.
        """
        if not self._drops(adapter):
            return lora_update_reference(self._pool(x), self.branch(adapter))
        base, scale = self.base_layer, self.scaling[adapter]
        learned, *fixed = (LoraTerm(base, *part, scale) for part in self._parts(adapter))
        result = lora_update_reference(self._pool(self.lora_dropout[adapter](x)), learned)
        for part in fixed:
            result = result + lora_update_reference(self._pool(x), part)
        return result

    def _is_one_step(self, adapter: str) -> bool:
        """Whether there is one A with one input, beside a base that is one product."""
        return is_one_step(self.base_layer) and not (self._drops(adapter) and (self.elastic or self.anchored))

    def _drops(self, adapter: str) -> bool:
        dropout = self.lora_dropout[adapter]
        return self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0

    def branch(self, adapter: str) -> LoraTerm:
        """The base with one update."""
        return LoraTerm(self.base_layer, *self.expanded_factors(adapter), self.scaling[adapter])

    def _input_of_update(self, adapter: str, x: Tensor) -> Tensor | None:
        """What A sees; None if that is x itself."""
        seen = self._pool(self.lora_dropout[adapter](x))
        return None if seen is x else seen

    def factors(self, adapter: str) -> Factors:
        """The plain LoRA that this adapter is: elastic paths folded in, a pooled A repeated over its groups."""
        a, b = self.expanded_factors(adapter)
        return Factors(a.repeat_interleave(self.pooled_inputs, dim=1), b)

    def expanded_factors(self, adapter: str) -> Factors:
        """The same with A of shape (R, L); with starting values that are taken off again, R is twice the rank."""
        (a_RL, b_OR), *fixed = self._parts(adapter)
        for part in fixed:
            if part.b_OR is b_OR:
                a_RL = a_RL + part.a_RI
            else:
                a_RL, b_OR = torch.cat([a_RL, part.a_RI]), torch.cat([b_OR, part.b_OR], dim=1)
        return Factors(a_RL, b_OR)

    def _parts(self, adapter: str) -> list[Factors]:
        """Pairs whose products make up the update: first the learned one that dropout is for, then the others.

        Source: Qin et al. 2024, arXiv 2402.05445, equation 16.
        """
        a_RL, b_OR = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        parts = [Factors(a_RL, b_OR)]
        if self.elastic:
            beta1, beta2 = self.lora_beta[adapter]
            b_OR = b_OR + beta2 * _mean_pattern(b_OR.shape[0], b_OR.shape[1], b_OR)
            parts = [Factors(a_RL, b_OR), Factors(beta1 * _mean_pattern(a_RL.shape[0], a_RL.shape[1], a_RL), b_OR)]
        if adapter in self.lora_start_A:
            parts.append(Factors(self.lora_start_A[adapter], -self.lora_start_B[adapter]))
        return parts

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to W, in its orientation."""
        a_RI, b_OR = self.factors(adapter)
        delta_OI = b_OR @ a_RI * self.scaling[adapter]
        return delta_OI.T if self.fan_in_fan_out else delta_OI

    def base_weight(self) -> Tensor:
        """W as the base computes with it, shape (O, I), float32; of shares, every process must ask for it."""
        base = self.get_base_layer()
        with unsharded_weights(base):
            if is_quantized(base):
                return base.quantizer.dequantize(base, torch.float32)
            return (base.weight.T if isinstance(base, Conv1D) else base.weight).float()

    @torch.no_grad()
    def _row_norms(self, adapter: str) -> Tensor:
        """Of W + s B A, shape (O,), float32: |w + s b A|^2 = |w|^2 + 2 s b A w + s^2 b A A^T b for each row."""
        base, scale = self.get_base_layer(), self.scaling[adapter]
        a_RI, b_OR = (factor.float() for factor in self.factors(adapter))
        # Products in the type that W is stored in: what is lost is a small part of the small terms.
        is_plain = not is_quantized(base) and not isinstance(base, Conv1D) and not is_sharded_tensor(base.weight)
        weight_OI = base.weight if is_plain else self.base_weight()
        if adapter not in self.base_row_norms:
            self.base_row_norms[adapter] = self.base_weight().square().sum(1)
        with torch.autocast(a_RI.device.type, enabled=False):
            crossed_OR = (weight_OI @ a_RI.T.to(weight_OI.dtype)).float()
            changed_OR = b_OR * (2 * scale * crossed_OR + scale**2 * b_OR @ (a_RI @ a_RI.T))
        return (self.base_row_norms[adapter] + changed_OR.sum(1)).clamp(min=0).sqrt()

    def _pool(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.pooled_inputs)).sum(-1) if self.pooled_inputs > 1 else x


class GroupedLinear(LowRankLinear):
    """QA-LoRA's update: constant within each group of the base's quantizer."""

    pooled = True


class IecLinear(LowRankLinear):
    """IR-QLoRA's update."""

    elastic = True


class GroupedIecLinear(LowRankLinear):
    """Both: the elastic path starts at the pooled input, so that the update stays constant within groups."""

    pooled = True
    elastic = True


class DifferenceLinear(LowRankLinear):
    """An update that starts from a part of W and at zero all the same."""

    anchored = True


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


def _mean_pattern(rows: int, columns: int, like: Tensor) -> Tensor:
    """The matrix that takes means over equal contiguous parts and repeats each, shape (rows, columns)."""
    parts = gcd(rows, columns)
    block = torch.full((rows // parts, columns // parts), parts / columns, dtype=like.dtype, device=like.device)
    return torch.block_diag(*[block] * parts)

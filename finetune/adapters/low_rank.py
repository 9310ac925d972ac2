"""Linear layers with a low-rank update: LoRA, DoRA, QA-LoRA, IR-QLoRA's IEC, and differences for PiSSA and OLoRA.

Shape legend: O out_features, I in_features, R rank, K inputs of a quantization group, L = I / K groups,
`...` any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any, ClassVar, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finetune.adapters.lora_linear import LoraTerm, is_fusable, lora_linear, lora_update_reference
from finetune.errors import UnsupportedError
from finetune.models.fsdp import is_sharded_tensor, unsharded_weights
from finetune.quantizers.base import Capabilities, is_quantized

SMALLEST_SQUARE = 1e-30
"""Lower bound of a squared row norm in DoRA."""


class Factors(NamedTuple):
    """The two factors of an update; the update of the weight is scale times `b_OR @ a_RI`."""

    a_RI: Tensor
    b_OR: Tensor


class Magnitude(nn.Module):
    """DoRA's trainable magnitude: the norm of each row of the adapted weight, shape (O,)."""

    def __init__(self, norms_O: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(norms_O)


class LowRankLinear(lora.Linear):
    """y = W x + s B A x over a full-precision or quantized W.

    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.
    """

    adapter_layer_names = (*lora.Linear.adapter_layer_names, "lora_beta")
    is_grouped: ClassVar[bool] = False
    """Whether the input of A is summed over each group of the base's quantizer (QA-LoRA)."""
    has_iec: ClassVar[bool] = False
    """Whether means of the input and of A x bypass A and B (IR-QLoRA's information elastic connection)."""
    subtracts_start: ClassVar[bool] = False
    """Whether the update is B A minus its initial value B0 A0 (PiSSA, OLoRA)."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **settings: Any) -> None:
        # Before PEFT's constructor, which calls the overridden methods below.
        self.group_size = _group_size(base_layer, settings.get("target_name", "")) if self.is_grouped else 1
        self.base_row_norms: dict[str, Tensor] = {}
        super().__init__(base_layer, adapter_name, config, **settings)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        in_features, out_features = super()._get_in_out_features(module)
        return in_features // self.group_size, out_features

    def resolve_lora_variant(self, *, config: LoraConfig, **settings: Any) -> None:
        """No variant of PEFT: the variants below also work over quantized weights."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **settings: Any) -> None:
        """Add an adapter; B and the betas start at zero, so the output is unchanged."""
        if not hasattr(self, "lora_beta"):  # the first call comes from within PEFT's constructor
            self.lora_beta = nn.ParameterDict({})
            self.lora_start_A, self.lora_start_B = nn.ParameterDict({}), nn.ParameterDict({})
        super().update_layer(adapter_name, r, lora_alpha, config, **settings)
        device = self.lora_A[adapter_name].weight.device
        if self.group_size > 1:
            # Kaiming-uniform scales by 1 / sqrt(inputs). PEFT saw L inputs; the equivalent plain LoRA has I = K L.
            with torch.no_grad():
                self.lora_A[adapter_name].weight.div_(self.group_size**0.5)
        if self.has_iec:
            self.lora_beta[adapter_name] = nn.Parameter(torch.zeros(2, device=device))
        if self.subtracts_start:
            # In float32 from the start: PEFT converts 16-bit adapter weights into new, trainable parameters.
            for start, factor in ((self.lora_start_A, self.lora_A), (self.lora_start_B, self.lora_B)):
                values = torch.zeros_like(factor[adapter_name].weight, dtype=torch.float32)
                start[adapter_name] = nn.Parameter(values, requires_grad=False)
        if config.use_dora:
            self.lora_magnitude_vector[adapter_name] = Magnitude(self._row_norms(adapter_name))
        # PEFT has done so before the parameters above existed; it sets which of them are trainable.
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def start_from(self, adapter: str, factors: Factors) -> None:
        """Set other initial values of A and B than Kaiming-uniform and zero.

        A difference layer subtracts their product again, so that it initially computes W x. The papers subtract s B A
        from W instead: the same function, but it would change the base, and a quantized W could not represent it.
        """
        for factor, start, value in (
            (self.lora_A, self.lora_start_A, factors.a_RI),
            (self.lora_B, self.lora_start_B, factors.b_OR),
        ):
            factor[adapter].weight.copy_(value)
            if self.subtracts_start:
                start[adapter].copy_(value)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W x plus every active update, in the dtype of W x; (..., I) -> (..., O)."""
        adapters = self._adapters_in_use()
        has_dora = any(name in self.lora_magnitude_vector for name in adapters)
        is_narrow = has_dora and _computes_in(x) is not torch.float32
        # Without gradients autograd saves nothing, so the fused function would gain nothing.
        if len(adapters) == 1 and self._is_fusable(adapters[0]) and (is_narrow or torch.is_grad_enabled()):
            adapter = adapters[0]
            growth_O = self._length_ratio(adapter) - 1 if is_narrow else None
            product = lora_linear(x, self._input_of_update(adapter, x), self.lora_term(adapter), growth_O)
            return product if is_narrow else self._to_norm(adapter, product)
        if is_narrow and is_quantized(self.base_layer):
            # DoRA's ratio needs more bits of the output than the activations have.
            with torch.autocast(x.device.type, enabled=False):
                return self._unfused(adapters, x.float(), *args, **kwargs).to(_computes_in(x))
        return self._unfused(adapters, x, *args, **kwargs)

    def _unfused(self, adapters: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for adapter in adapters:
            result = self._to_norm(adapter, result + self.update(adapter, x).to(result.dtype))
        return result

    def _adapters_in_use(self) -> list[str]:
        if self.disable_adapters or self.merged:
            return []
        return [adapter for adapter in self.active_adapters if adapter in self.lora_A]

    def _to_norm(self, adapter: str, product: Tensor) -> Tensor:
        """DoRA: scale each output of (W + s B A) x by m / |W + s B A|, the norm of its row; (..., O).

        The norms are constants for the gradient.

        Source: Liu et al. 2024, arXiv 2402.09353, equations 5 and 11.
        """
        if adapter not in self.lora_magnitude_vector:
            return product
        scale_O = self._length_ratio(adapter)
        bias = self.get_base_layer().bias  # is not part of the adapted weight, so it must not be scaled
        scaled = product * scale_O if bias is None else (product - bias) * scale_O + bias
        return scaled.to(product.dtype)

    def _length_ratio(self, adapter: str) -> Tensor:
        """The ratio m / |W + s B A|, (O,), float32: in bfloat16, whose next to 1 is 1.0078, it would not train."""
        ratio_O: Tensor = self.lora_magnitude_vector[adapter].weight / self._row_norms(adapter)
        return ratio_O

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """The update s B A x of one adapter, (..., I) -> (..., O), in the dtype of x.

        QA-LoRA: the input of A is the sum over each group of K inputs. IEC: u = A x + beta1 up(mean(x)), and the update
        is s (B u + beta2 up(mean(u))); mean and up use gcd(widths) equal parts. Dropout applies to the input of the
        trained A only, neither to the means of IEC nor to the initial value that a difference layer subtracts.

        Source: Xu et al. 2024, arXiv 2309.14717, algorithm 1; Qin et al. 2024, arXiv 2402.05445, equations 13-16,
        means repeated element by element as in equation 16.
        """
        if not self._drops(adapter):
            return lora_update_reference(self._group_sums(x), self.lora_term(adapter))
        base, scale = self.base_layer, self.scaling[adapter]
        learned, *fixed = (LoraTerm(base, *part, scale) for part in self._terms(adapter))
        result = lora_update_reference(self._group_sums(self.lora_dropout[adapter](x)), learned)
        for part in fixed:
            result = result + lora_update_reference(self._group_sums(x), part)
        return result

    def _is_fusable(self, adapter: str) -> bool:
        """Whether `lora_linear` applies: one product B A with one input, over a base that is a plain matmul."""
        return is_fusable(self.base_layer) and not (self._drops(adapter) and (self.has_iec or self.subtracts_start))

    def _drops(self, adapter: str) -> bool:
        dropout = self.lora_dropout[adapter]
        return self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0

    def lora_term(self, adapter: str) -> LoraTerm:
        """The operands of the base and one adapter."""
        return LoraTerm(self.base_layer, *self.group_factors(adapter), self.scaling[adapter])

    def _input_of_update(self, adapter: str, x: Tensor) -> Tensor | None:
        """The input of A, after dropout and grouping; None if it is x itself."""
        seen = self._group_sums(self.lora_dropout[adapter](x))
        return None if seen is x else seen

    def factors(self, adapter: str) -> Factors:
        """The equivalent plain LoRA, A (R, I) and B (O, R): IEC merged in, a grouped A repeated over its groups."""
        a, b = self.group_factors(adapter)
        return Factors(a.repeat_interleave(self.group_size, dim=1), b)

    def group_factors(self, adapter: str) -> Factors:
        """As `factors`, with A of shape (R, L); for a difference layer R is twice the rank."""
        (a_RL, b_OR), *fixed = self._terms(adapter)
        for part in fixed:
            if part.b_OR is b_OR:  # B A1 + B A2 = B (A1 + A2)
                a_RL = a_RL + part.a_RI
            else:  # B1 A1 + B2 A2 = [B1 B2] [A1; A2]
                a_RL, b_OR = torch.cat([a_RL, part.a_RI]), torch.cat([b_OR, part.b_OR], dim=1)
        return Factors(a_RL, b_OR)

    def _terms(self, adapter: str) -> list[Factors]:
        """Factors whose products add up to the update: first the trained pair, with dropout, then the others.

        Source: Qin et al. 2024, arXiv 2402.05445, equation 16.
        """
        a_RL, b_OR = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        parts = [Factors(a_RL, b_OR)]
        if self.has_iec:
            # Equation 16: means are matrices, so B' = B + beta2 M2 and A' = A + beta1 M1 are an ordinary pair.
            beta1, beta2 = self.lora_beta[adapter]
            b_OR = b_OR + beta2 * _mean_pattern(b_OR.shape[0], b_OR.shape[1], b_OR)
            parts = [Factors(a_RL, b_OR), Factors(beta1 * _mean_pattern(a_RL.shape[0], a_RL.shape[1], a_RL), b_OR)]
        if adapter in self.lora_start_A:
            # minus B0 A0
            parts.append(Factors(self.lora_start_A[adapter], -self.lora_start_B[adapter]))
        return parts

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of W in the orientation of the stored weight: (O, I), or (I, O) in a Conv1D."""
        a_RI, b_OR = self.factors(adapter)
        delta_OI = b_OR @ a_RI * self.scaling[adapter]
        return delta_OI.T if self.fan_in_fan_out else delta_OI

    @property
    def is_stored_transposed(self) -> bool:
        """Whether the model's files hold the weight as (I, O), as GPT-2's do."""
        base = self.get_base_layer()
        return base.stored_transposed if is_quantized(base) else isinstance(base, Conv1D)

    def base_weight(self) -> Tensor:
        """W as the base computes with it, shape (O, I), float32; all-gathered if sharded: call it on every rank."""
        base = self.get_base_layer()
        with unsharded_weights(base):
            if is_quantized(base):
                return base.quantizer.dequantize(base, torch.float32)
            return (base.weight.T if isinstance(base, Conv1D) else base.weight).float()

    @torch.no_grad()
    def _row_norms(self, adapter: str) -> Tensor:
        """The norm of each row of W + s B A, shape (O,), float32.

        |w + s b A|^2 = |w|^2 + 2 s b A w + s^2 b A A^T b for the rows w of W and b of B: the sum W + s B A, as large as
        W, is never formed, and |w|^2 is computed once.
        """
        base, scale = self.get_base_layer(), self.scaling[adapter]
        a_RI, b_OR = (factor.float() for factor in self.factors(adapter))
        # Matmuls in the dtype of W: a float32 copy of W would cost more than the rounding of these small terms.
        is_plain = not is_quantized(base) and not isinstance(base, Conv1D) and not is_sharded_tensor(base.weight)
        weight_OI = base.weight if is_plain else self.base_weight()
        if adapter not in self.base_row_norms:
            self.base_row_norms[adapter] = self.base_weight().square().sum(1)
        # Autocast would round the float32 terms to 16 bits.
        with torch.autocast(a_RI.device.type, enabled=False):
            crossed_OR = (weight_OI @ a_RI.T.to(weight_OI.dtype)).float()
            changed_OR = b_OR * (2 * scale * crossed_OR + scale**2 * b_OR @ (a_RI @ a_RI.T))
        # Rounding can make the sum of a row near zero slightly negative. A row of zeros, such as that of a padding
        # token in a head that is tied to the embeddings, has no direction: its ratio m / |row| is 1 until it has one.
        return (self.base_row_norms[adapter] + changed_OR.sum(1)).clamp(min=SMALLEST_SQUARE).sqrt()

    def _group_sums(self, x: Tensor) -> Tensor:
        # Sums, as in algorithm 1 of QA-LoRA. The authors' code averages: the same up to a factor K in A.
        return x.unflatten(-1, (-1, self.group_size)).sum(-1) if self.group_size > 1 else x


class GroupedLinear(LowRankLinear):
    """QA-LoRA: an update that is constant within each group of the base's quantizer."""

    is_grouped = True


class IecLinear(LowRankLinear):
    """IR-QLoRA: LoRA with the information elastic connection (IEC)."""

    has_iec = True


class GroupedIecLinear(LowRankLinear):
    """QA-LoRA with IEC, whose means are over the group sums, so that the update stays constant within groups."""

    is_grouped = True
    has_iec = True


class DifferenceLinear(LowRankLinear):
    """PiSSA and OLoRA: s (B A - B0 A0), which starts at zero although A and B start from W."""

    subtracts_start = True


def has_groups(layer: nn.Module) -> bool:
    """Whether a layer is quantized in groups of inputs with float minimums, to which a constant can be added."""
    stored = layer.quantizer.capabilities if is_quantized(layer) else Capabilities()
    return stored.float_zero_points and stored.group_size is not None


def _computes_in(x: Tensor) -> torch.dtype:
    """The dtype of a linear layer's matmul: autocast's, or that of its input."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _group_size(base_layer: nn.Module, name: str) -> int:
    """Inputs of a quantization group of the base (K), see `has_groups`."""
    while isinstance(base_layer, BaseTunerLayer):  # PEFT nests adapters of experts
        base_layer = base_layer.base_layer
    stored = base_layer.quantizer.capabilities if is_quantized(base_layer) else Capabilities()
    if not has_groups(base_layer) or stored.group_size is None:
        raise UnsupportedError(
            f"QA-LoRA needs groups with float minimums, which the layer {name} does not have",
            where="adapter.method",
            hint="set quantization.kind to affine, hqq or optq, name a model that is quantized so, "
            "or exclude the layer in adapter.target_modules",
        )
    return stored.group_size


def _mean_pattern(rows: int, columns: int, like: Tensor) -> Tensor:
    """The matrix of IEC that maps inputs to the repeated means of gcd(rows, columns) equal parts, (rows, columns).

    Source: Qin et al. 2024, arXiv 2402.05445, equation 16.
    """
    parts = gcd(rows, columns)
    # A mean over columns / parts inputs has the weight parts / columns.
    block = torch.full((rows // parts, columns // parts), parts / columns, dtype=like.dtype, device=like.device)
    return torch.block_diag(*[block] * parts)

"""Section `quantization`: how the frozen base's linear weights are stored."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from finetune.recipe.section import Section


class QuantizationSection(Section):
    """Base of all kinds of quantization."""

    implementation: ClassVar[str]


class NoQuantization(QuantizationSection):
    """Weights as they come, in `model.dtype`."""

    implementation: ClassVar[str] = "finetune.quantizers.full_precision:FullPrecision"
    kind: Literal["none"] = "none"


class FourBit(QuantizationSection):
    """4-bit codes per block with an absolute maximum each (Dettmers et al. 2023, arXiv 2305.14314)."""

    implementation: ClassVar[str] = "finetune.quantizers.bits_and_bytes:FourBitQuantizer"
    kind: Literal["nf4", "fp4"] = Field(
        description="nf4: quantiles of a normal distribution. fp4: a 4-bit floating-point number."
    )
    double_quant: bool = Field(True, description="Quantize the blocks' maxima to 8 bits as well.")
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(
        64, description="Weights that share one maximum."
    )


class EightBit(QuantizationSection):
    """LLM.int8(): 8-bit rows, outlier columns in 16 bits (Dettmers et al. 2022, arXiv 2208.07339)."""

    implementation: ClassVar[str] = "finetune.quantizers.bits_and_bytes:EightBitQuantizer"
    kind: Literal["int8"]
    outlier_threshold: float = Field(
        6.0, ge=0, description="Input columns with a magnitude above this are not quantized; 0 quantizes all."
    )


Quantization = Annotated[NoQuantization | FourBit | EightBit, Field(discriminator="kind")]

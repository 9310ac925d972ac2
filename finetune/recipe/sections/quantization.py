"""Section `quantization`: how the frozen base's linear weights are stored."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from finetune.recipe.sections.section import OnResume, Section


class QuantizationSection(Section):
    """Base of all kinds of quantization."""

    implementation: ClassVar[str]
    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    quantizes: ClassVar[bool] = True
    costs: ClassVar[str]
    """What a weight takes."""
    merges: ClassVar[str] = "merges after dequantizing"
    loads_in: ClassVar[str] = "ft; merged: every engine"
    """What reads weights that are stored so."""
    kind: str


class NoQuantization(QuantizationSection):
    """Weights as they come, in `model.dtype`."""

    quantizes: ClassVar[bool] = False
    costs: ClassVar[str] = "16 or 32 bits"
    merges: ClassVar[str] = "merges as it is"
    loads_in: ClassVar[str] = "every engine"
    kind: Literal["none"] = "none"


class FourBit(QuantizationSection):
    """4-bit codes per block with an absolute maximum each (Dettmers et al. 2023, arXiv 2305.14314)."""

    implementation: ClassVar[str] = "finetune.quantizers.codebook:four_bit"
    costs: ClassVar[str] = "4.127 bits, 4.5 without double_quant"
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
    costs: ClassVar[str] = "8 bits and a number a row"
    loads_in: ClassVar[str] = "merged: every engine"
    kind: Literal["int8"]
    outlier_threshold: float = Field(
        6.0, ge=0, description="Input columns with a magnitude above this are not quantized; 0 quantizes all."
    )


class Groupwise(QuantizationSection):
    """Base of all that have a scale and a float minimum per group of inputs: W = scale * code + minimum."""

    bits: Literal[2, 3, 4, 8] = Field(4, description="Bits of one code.")
    group_size: Literal[8, 16, 32, 64, 128, 256] = Field(
        32, description="Inputs of an output that share scale and minimum; it must divide every layer's inputs."
    )
    scale_dtype: Literal["float16", "float32"] = Field("float16", description="How a group's scale is stored.")
    minimum_dtype: Literal["float16", "float32"] = Field("float16", description="How a group's minimum is stored.")


class Affine(Groupwise):
    """Codes of 2, 3, 4 or 8 bits, rounded to nearest between a group's smallest and largest weight."""

    implementation: ClassVar[str] = "finetune.quantizers.affine:AffineQuantizer"
    costs: ClassVar[str] = "bits + 32 / group_size"
    merges: ClassVar[str] = "merges with qa_lora as it is, else after dequantizing"
    kind: Literal["affine"]


class Hqq(Groupwise):
    """Half-quadratic quantization: zero points that minimise a sparse norm of the error (Badri and Shaji 2023)."""

    implementation: ClassVar[str] = "finetune.quantizers.hqq:HqqQuantizer"
    costs: ClassVar[str] = "bits + 32 / group_size"
    merges: ClassVar[str] = "merges with qa_lora as it is, else after dequantizing"
    kind: Literal["hqq"]


class Optq(Groupwise):
    """OPTQ: each rounding error is made up for by weights still to come (Frantar et al. 2023, arXiv 2210.17323)."""

    implementation: ClassVar[str] = "finetune.quantizers.optq:OptqQuantizer"
    costs: ClassVar[str] = "bits + 32 / group_size"
    merges: ClassVar[str] = "merges with qa_lora as it is, else after dequantizing"
    kind: Literal["optq"]
    calibration_rows: int = Field(
        128,
        ge=1,
        description="Training rows, drawn by training.seed, whose inputs to each layer errors are weighed by.",
    )
    damping: float = Field(
        0.01, gt=0, le=1, description="Added to the Hessian's diagonal, as a share of its mean: more trusts rows less."
    )


class InformationCalibrated(QuantizationSection):
    """NF2, NF3 or NF4 with the shift per block that keeps most information (Qin et al. 2024, arXiv 2402.05445)."""

    implementation: ClassVar[str] = "finetune.quantizers.information:InformationCalibratedQuantizer"
    costs: ClassVar[str] = "bits + 0.254"
    kind: Literal["icq"]
    bits: Literal[2, 3, 4] = Field(4, description="Bits of one code.")
    block_size: Literal[32, 64, 128, 256] = Field(64, description="Weights that share one maximum and one shift.")
    double_quant: bool = Field(True, description="Quantize the blocks' maxima and shifts to 8 bits as well.")
    candidates: int = Field(
        100, ge=1, le=1000, description="Shifts that are tried on either side of the block's median; fewer are faster."
    )
    search_width: float = Field(
        0.1, gt=0, le=1, description="How far from the median shifts are tried, in standard deviations."
    )


class PluginQuantization(QuantizationSection):
    """A quantizer of another installed package, which registers it as an entry point of the group `ft.quantizers`."""

    implementation: ClassVar[str] = "finetune.quantizers.plugin:installed_quantizer"
    costs: ClassVar[str] = "what the package says"
    merges: ClassVar[str] = "merges after dequantizing"
    kind: Literal["plugin"]
    name: str = Field(min_length=1, description="The entry point's name.")
    options: dict[str, str | int | float | bool | None] = Field({}, description="What the quantizer itself is told.")


Quantization = Annotated[
    NoQuantization | FourBit | EightBit | Affine | Hqq | Optq | InformationCalibrated | PluginQuantization,
    Field(discriminator="kind"),
]


class StoredQuantization(Section):
    """`quantization_config` in the config.json of a folder with quantized weights."""

    quant_method: Literal["ft"] = "ft"
    version: Literal[1] = 1
    quantizers: list[Quantization] = Field(description="How layers are quantized, each way once.")
    layers: dict[str, int] = Field(description="From a layer's name to the index of its quantizer.")

    @model_validator(mode="after")
    def _each_layer_has_a_quantizer(self) -> Self:
        for name, index in self.layers.items():
            if not 0 <= index < len(self.quantizers):
                raise ValueError(f"the layer {name} has quantizer {index} of {len(self.quantizers)}")
        return self

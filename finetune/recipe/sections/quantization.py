"""Section `quantization`: storage of the frozen base's linear weights."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from finetune.recipe.sections.section import OnResume, Section


class QuantizationSection(Section):
    """Base class of all kinds of quantization."""

    implementation: ClassVar[str]
    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    quantizes: ClassVar[bool] = True
    costs: ClassVar[str]
    """Storage per weight."""
    merges: ClassVar[str] = "merges after dequantizing"
    """Result of a merge."""
    loads_in: ClassVar[str] = "ft; merged: every engine"
    """Programs that load weights of this kind."""
    kind: str


class NoQuantization(QuantizationSection):
    """No quantization: weights in `model.dtype`."""

    quantizes: ClassVar[bool] = False
    costs: ClassVar[str] = "16 or 32 bits"
    merges: ClassVar[str] = "merges as it is"
    loads_in: ClassVar[str] = "every engine"
    kind: Literal["none"] = "none"


class FourBit(QuantizationSection):
    """4-bit codes with one absolute maximum per block (Dettmers et al. 2023, arXiv 2305.14314)."""

    implementation: ClassVar[str] = "finetune.quantizers.codebook:four_bit"
    costs: ClassVar[str] = "4.127 bits, 4.5 without double_quant"
    kind: Literal["nf4", "fp4"] = Field(
        description="nf4: quantiles of a normal distribution. fp4: 4-bit floating point."
    )
    double_quant: bool = Field(True, description="Quantize the blocks' maxima to 8 bits as well.")
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(
        64, description="Weights per block, which have one maximum."
    )


class EightBit(QuantizationSection):
    """LLM.int8(): 8-bit rows, outlier columns in 16 bits (Dettmers et al. 2022, arXiv 2208.07339)."""

    implementation: ClassVar[str] = "finetune.quantizers.bits_and_bytes:EightBitQuantizer"
    costs: ClassVar[str] = "8 bits, and a scale per row"
    loads_in: ClassVar[str] = "merged: every engine"
    kind: Literal["int8"]
    outlier_threshold: float = Field(
        6.0,
        ge=0,
        description="On a GPU, input columns with a larger magnitude stay in 16 bits; 0 quantizes all. A column counts "
        "if any row of the batch exceeds it, so that the loss of a row depends on its batch, by a few thousandths of a "
        "nat. On a CPU inputs are not quantized.",
    )


class Groupwise(QuantizationSection):
    """Base class of quantizers with a scale and a float minimum per group of inputs: W = scale * code + minimum."""

    bits: Literal[2, 3, 4, 8] = Field(4, description="Bits per code.")
    group_size: Literal[8, 16, 32, 64, 128, 256] = Field(
        32, description="Inputs per group, which have one scale and minimum; it must divide every layer's input size."
    )
    scale_dtype: Literal["float16", "float32"] = Field("float16", description="Storage type of the scales.")
    minimum_dtype: Literal["float16", "float32"] = Field("float16", description="Storage type of the minimums.")


class Affine(Groupwise):
    """Round to nearest: 2, 3, 4 or 8 bits between a group's smallest and largest weight."""

    implementation: ClassVar[str] = "finetune.quantizers.affine:AffineQuantizer"
    costs: ClassVar[str] = "bits + 32 / group_size"
    merges: ClassVar[str] = "with qa_lora merges in quantized form, else after dequantizing"
    kind: Literal["affine"]


class Hqq(Groupwise):
    """Half-quadratic quantization: zero points that minimize a sparse norm of the error (Badri and Shaji 2023)."""

    implementation: ClassVar[str] = "finetune.quantizers.hqq:HqqQuantizer"
    costs: ClassVar[str] = "bits + 32 / group_size"
    merges: ClassVar[str] = "with qa_lora merges in quantized form, else after dequantizing"
    kind: Literal["hqq"]


class Optq(Groupwise):
    """OPTQ (GPTQ): later weights compensate each rounding error (Frantar et al. 2023, arXiv 2210.17323)."""

    implementation: ClassVar[str] = "finetune.quantizers.optq:OptqQuantizer"
    costs: ClassVar[str] = "bits + 32 / group_size"
    merges: ClassVar[str] = "with qa_lora merges in quantized form, else after dequantizing"
    kind: Literal["optq"]
    calibration_rows: int = Field(
        128,
        ge=1,
        description="Number of training rows for calibration, sampled with data.sample_seed.",
    )
    damping: float = Field(
        0.01,
        gt=0,
        le=1,
        description="Damping of the Hessian: this fraction of its mean diagonal is added to the diagonal.",
    )


class InformationCalibrated(QuantizationSection):
    """NF2, NF3 or NF4 with the shift per block of maximum entropy (Qin et al. 2024, arXiv 2402.05445)."""

    implementation: ClassVar[str] = "finetune.quantizers.information:InformationCalibratedQuantizer"
    costs: ClassVar[str] = "bits + 0.254"
    kind: Literal["icq"]
    bits: Literal[2, 3, 4] = Field(4, description="Bits per code.")
    block_size: Literal[32, 64, 128, 256] = Field(
        64, description="Weights per block, which have one maximum and one shift."
    )
    double_quant: bool = Field(True, description="Quantize the blocks' maxima and shifts to 8 bits as well.")
    candidates: int = Field(
        100, ge=1, le=1000, description="Candidate shifts on either side of the block's median; fewer are faster."
    )
    search_width: float = Field(
        0.1, gt=0, le=1, description="Largest distance of a candidate from the median, in standard deviations."
    )


class PluginQuantization(QuantizationSection):
    """A quantizer of another package, registered as an entry point of the group `ft.quantizers`."""

    implementation: ClassVar[str] = "finetune.quantizers.plugin:installed_quantizer"
    costs: ClassVar[str] = "depends on the package"
    merges: ClassVar[str] = "merges after dequantizing"
    kind: Literal["plugin"]
    name: str = Field(min_length=1, description="The entry point's name.")
    options: dict[str, str | int | float | bool | None] = Field({}, description="Options of the quantizer.")


Quantization = Annotated[
    NoQuantization | FourBit | EightBit | Affine | Hqq | Optq | InformationCalibrated | PluginQuantization,
    Field(discriminator="kind"),
]


class StoredQuantization(Section):
    """The entry `quantization_config` in the config.json of a folder with quantized weights."""

    quant_method: Literal["ft"] = "ft"
    version: Literal[1] = 1
    quantizers: list[Quantization] = Field(description="The distinct quantizers.")
    layers: dict[str, int] = Field(description="Index of the quantizer by layer name.")

    @model_validator(mode="after")
    def _each_layer_has_a_quantizer(self) -> Self:
        for name, index in self.layers.items():
            if not 0 <= index < len(self.quantizers):
                raise ValueError(f"the layer {name} has quantizer {index} of {len(self.quantizers)}")
        return self

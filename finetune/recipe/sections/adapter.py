"""Section `adapter`: what is trained on top of the base."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from finetune.recipe.sections.section import FilePath, OnResume, Section


class AdapterSection(Section):
    """Base of all methods."""

    implementation: ClassVar[str]
    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    trains_base: ClassVar[bool] = False
    """Whether the base's own weights train; they then keep a full-precision copy."""
    has_rank: ClassVar[bool] = False
    """Whether layers have updates of some rank, which `modules` can set."""
    needs_full_precision: ClassVar[bool] = False
    """Whether the method computes with the weight's own numbers, which a quantized layer does not hold."""
    standalone_by: ClassVar[str | None] = "merge"
    """The command that writes the trained model so that it needs no adapter; None where there is no such form."""
    can_be_extended: ClassVar[bool] = True
    """Whether a run can be made longer: not where its first steps would have been others then."""
    costs: ClassVar[str]
    """What trains, in numbers."""
    merges: ClassVar[str] = "merges into plain weights"
    loads_in: ClassVar[str] = "PEFT"
    """What reads the adapter's folder, beside ft."""
    method: str

    @property
    def prompt_tokens(self) -> int:
        """Places that the method takes in front of every row."""
        return 0


Targets = Literal["all-linear"] | list[str]
TARGETS: Any = Field(
    "all-linear",
    description="Layers that are adapted: `all-linear` (all but the output head), or a list of name endings.",
)


class Continuable(AdapterSection):
    """Base of the methods that can go on from what an earlier run has trained."""

    continue_from: FilePath | None = Field(
        None,
        description="Directory of a finished run over the same base, whose adapter this one starts as.",
    )


class LowRank(Continuable):
    """Base of the methods whose update is a product of two thin matrices."""

    has_rank: ClassVar[bool] = True
    r: int = Field(16, ge=1, description="Rank of the update.")
    alpha: float = Field(32.0, gt=0, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the update while training.")
    target_modules: Targets = TARGETS
    modules_to_save: list[str] = Field(
        [],
        description=(
            "Whole modules that train beside the updates, such as embed_tokens or lm_head, by name endings. Engines "
            "that serve adapters refuse these: merge instead."
        ),
    )
    trainable_tokens: list[str] = Field(
        [], description="Tokens whose embeddings train as well; each must be one token of the vocabulary."
    )


class FixedRank(LowRank):
    """Base of the methods that keep the rank they start with."""

    iec: bool = Field(
        False,
        description=(
            "Information elastic connection of IR-QLoRA (Qin et al. 2024, arXiv 2402.05445): means of input and "
            "bottleneck go around the two matrices, each times a learned number. Folds into a plain LoRA."
        ),
    )


class Lora(FixedRank):
    """A low-rank update beside each target layer (Hu et al. 2021, arXiv 2106.09685)."""

    implementation: ClassVar[str] = "finetune.adapters.lora:LoraMethod"
    costs: ClassVar[str] = "r (in + out) a layer"
    loads_in: ClassVar[str] = "PEFT, vLLM, llama.cpp (not with dora or modules_to_save)"
    method: Literal["lora"]
    rslora: bool = Field(False, description="Scale the update by alpha / sqrt(r), for large ranks (arXiv 2312.03732).")
    loraplus_ratio: float = Field(
        1.0, gt=0, description="Learning rate of B as a multiple of A's; LoRA+ uses 16 (arXiv 2402.12354)."
    )
    dora: bool = Field(False, description="Train the length of each row of the weight as well (arXiv 2402.09353).")
    initialization: Literal["zero", "pissa", "olora", "loftq"] = Field(
        "zero",
        description=(
            "What the update starts from. zero: nothing. pissa, olora: the weight's largest singular vectors "
            "(arXiv 2404.02948), or columns of its QR factors (arXiv 2406.01775). loftq: what quantization has lost "
            "(arXiv 2310.08659)."
        ),
    )


class QaLora(FixedRank):
    """A low-rank update that a group-wise quantized base takes up without loss (Xu et al. 2024, arXiv 2309.14717)."""

    implementation: ClassVar[str] = "finetune.adapters.qa_lora:QaLoraMethod"
    costs: ClassVar[str] = "r (in / group_size + out) a layer"
    merges: ClassVar[str] = "merges into the quantized weights, without rounding"
    loads_in: ClassVar[str] = "PEFT over the dequantized base; merged: ft"
    method: Literal["qa_lora"]


class AdaLora(LowRank):
    """A low-rank update whose ranks move to the layers that need them (Zhang et al. 2023, arXiv 2303.10512).

    The letters in the descriptions are the paper's. Shares of the steps become whole numbers of them, rounded down.
    """

    implementation: ClassVar[str] = "finetune.adapters.adalora:AdaLoraMethod"
    can_be_extended: ClassVar[bool] = False
    costs: ClassVar[str] = "r (in + out + 1) a layer, and two averages of each"
    loads_in: ClassVar[str] = "PEFT, vLLM, as the LoRA that it ends as"
    method: Literal["adalora"]
    r: int = Field(12, ge=2, description="Rank that each layer starts with, and the most that it can keep.")
    target_r: int = Field(8, ge=1, description="Mean rank of the layers in the end; the budget is as many times that.")
    orthogonal_weight: float = Field(
        0.1,
        ge=0,
        description="Weight of the term that keeps singular vectors orthogonal, in the training loss (gamma).",
    )
    sensitivity_decay: float = Field(0.85, gt=0, lt=1, description="Smoothing of sensitivities (beta_1).")
    uncertainty_decay: float = Field(0.85, gt=0, lt=1, description="Smoothing of their uncertainties (beta_2).")
    initial_ratio: float = Field(
        0.1, ge=0, lt=1, description="Share of all steps in which every layer keeps rank r (t_i)."
    )
    initial_steps: int | None = Field(None, ge=0, description="The same as a number of steps; replaces initial_ratio.")
    final_ratio: float = Field(
        0.4, ge=0, lt=1, description="Share of all steps in which the chosen ranks stay as they are (t_f)."
    )
    final_steps: int | None = Field(None, ge=0, description="The same as a number of steps; replaces final_ratio.")
    allocate_every: int | None = Field(
        None,
        ge=1,
        description="Steps from one choice of ranks to the next (Delta T); by default a hundredth of those in between.",
    )

    def phases(self, total_steps: int) -> Phases:
        """How many of all steps come before the budget falls, while it falls, and after that."""
        initial = self.initial_steps if self.initial_steps is not None else int(self.initial_ratio * total_steps)
        final = self.final_steps if self.final_steps is not None else int(self.final_ratio * total_steps)
        return Phases(initial, total_steps - initial - final, final)

    def lack_of_steps(self, total_steps: int) -> str | None:
        """What is wrong with so many steps, in words, if ranks cannot be chosen in them.

        The budget must fall in one step at least, and an earlier one must have fed the scores.
        """
        initial, falling, final = self.phases(total_steps)
        if falling >= 1 and initial + falling >= 2:
            return None
        return f"of {total_steps} steps {initial} come before ranks are chosen and {final} after: too few are left"


class Phases(NamedTuple):
    """Optimizer steps of AdaLoRA's three phases."""

    initial: int
    falling: int
    final: int


class SoftPrompt(AdapterSection):
    """Base of the methods that train what the model reads before every row, and nothing of the model."""

    standalone_by: ClassVar[str | None] = "export"
    tokens: int = Field(20, ge=1, description="Length of the prompt, in tokens of the context that it takes.")

    @property
    def prompt_tokens(self) -> int:
        """Places that the prompt takes in front of every row."""
        return self.tokens


Label = Annotated[str, Field(min_length=1)]


class PromptStart(Section):
    """Base of what a prompt starts as."""

    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    kind: str


class LabelsStart(PromptStart):
    """The prompt starts as class labels, each the mean over its tokens; what is left, as common words."""

    kind: Literal["labels"]
    labels: list[Label] = Field(min_length=1, description="The labels, as the model is to write them.")


class VocabularyStart(PromptStart):
    """The prompt starts as tokens drawn from the first 5,000 of the vocabulary that are text.

    Tokenizers number their tokens by how common they were where they were trained, as T5's of the paper does.
    """

    kind: Literal["vocabulary"]


class TextStart(PromptStart):
    """The prompt starts as a text, repeated until it is as long."""

    kind: Literal["text"]
    text: str = Field(min_length=1, description="Such as an instruction: `Classify the sentiment.`")


class UniformStart(PromptStart):
    """The prompt starts as numbers drawn evenly from [-0.5, 0.5]."""

    kind: Literal["uniform"]


Start = Annotated[LabelsStart | VocabularyStart | TextStart | UniformStart, Field(discriminator="kind")]


class PromptTuning(SoftPrompt, Continuable):
    """Vectors in front of every row's embeddings (Lester et al. 2021, arXiv 2104.08691)."""

    implementation: ClassVar[str] = "finetune.adapters.prompt_tuning:PromptTuningMethod"
    costs: ClassVar[str] = "tokens x width in all"
    merges: ClassVar[str] = "does not merge (ft export makes it tokens of the vocabulary)"
    loads_in: ClassVar[str] = "PEFT; exported: every engine"
    method: Literal["prompt_tuning"]
    tokens: int = Field(100, ge=1, description="Length of the prompt; the paper gains little beyond 20.")
    start: Start = Field(VocabularyStart(kind="vocabulary"), description="What the prompt starts as.")


class PTuning(SoftPrompt):
    """Prompt tuning through a small network that ties the vectors together (Liu et al. 2021, arXiv 2103.10385)."""

    implementation: ClassVar[str] = "finetune.adapters.p_tuning:PTuningMethod"
    costs: ClassVar[str] = "tokens x width in all, and a network while training"
    merges: ClassVar[str] = "does not merge (ft export makes it tokens of the vocabulary)"
    loads_in: ClassVar[str] = "PEFT; exported: every engine"
    method: Literal["p_tuning"]
    encoder: Literal["lstm", "mlp"] = Field(
        "lstm",
        description=(
            "Network that makes the vectors while training: a bidirectional LSTM and a perceptron as in the paper, "
            "or a perceptron alone."
        ),
    )
    hidden_size: int | None = Field(
        None, ge=1, description="Width inside the network; by default that of the model's embeddings."
    )


class PrefixTuning(SoftPrompt):
    """Keys and values in front of every row in every layer (Li and Liang 2021, arXiv 2101.00190)."""

    implementation: ClassVar[str] = "finetune.adapters.prefix_tuning:PrefixTuningMethod"
    costs: ClassVar[str] = "tokens x layers x width of keys and values"
    merges: ClassVar[str] = "does not merge"
    loads_in: ClassVar[str] = "PEFT"
    standalone_by: ClassVar[str | None] = None
    method: Literal["prefix_tuning"]
    projection: int | None = Field(
        512,
        ge=1,
        description=(
            "Width inside the perceptron that makes keys and values while training, as in the paper; null trains them "
            "directly, and they start as those of common words."
        ),
    )


class Vera(Continuable):
    """Two vectors per layer around random matrices that all layers share (Kopiczko et al. 2024, arXiv 2310.11454)."""

    implementation: ClassVar[str] = "finetune.adapters.peft_methods:VeraMethod"
    costs: ClassVar[str] = "r + out a layer, beside r (in + out) shared ones that do not train"
    method: Literal["vera"]
    r: int = Field(256, ge=1, description="Rank of the shared matrices.")
    initial: float = Field(0.1, gt=0, description="What the inner vector starts at.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the update while training.")
    projection_seed: int = Field(0, ge=0, description="Seed of the shared matrices.")
    target_modules: Targets = TARGETS


class Ia3(Continuable):
    """A learned factor per output, or per input of feed-forward layers (Liu et al. 2022, arXiv 2205.05638)."""

    implementation: ClassVar[str] = "finetune.adapters.peft_methods:Ia3Method"
    costs: ClassVar[str] = "out or in a layer"
    needs_full_precision: ClassVar[bool] = True
    method: Literal["ia3"]
    target_modules: list[str] = Field(
        ["k_proj", "v_proj", "down_proj"], min_length=1, description="Layers with factors, by name endings."
    )
    feedforward_modules: list[str] = Field(
        ["down_proj"], description="Those of them whose inputs are scaled, not their outputs."
    )


class FactoredUpdate(Continuable):
    """Base of the methods whose update is another product of small factors than LoRA's."""

    needs_full_precision: ClassVar[bool] = True
    r: int = Field(8, ge=1, description="Rank of the factors, of LoKr's the larger one.")
    alpha: float = Field(8.0, gt=0, description="The update is scaled by alpha / r.")
    module_dropout: float = Field(0.0, ge=0, lt=1, description="Chance that a layer is left without update in a step.")
    target_modules: Targets = TARGETS


class LoHa(FactoredUpdate):
    """The entrywise product of two low-rank updates (Hyeon-Woo et al. 2022, arXiv 2108.06098)."""

    implementation: ClassVar[str] = "finetune.adapters.peft_methods:LoHaMethod"
    costs: ClassVar[str] = "2 r (in + out) a layer"
    method: Literal["loha"]


class LoKr(FactoredUpdate):
    """A Kronecker product as update (Yeh et al. 2024, arXiv 2309.14859)."""

    implementation: ClassVar[str] = "finetune.adapters.peft_methods:LoKrMethod"
    costs: ClassVar[str] = "fewer than LoRA of the same rank"
    method: Literal["lokr"]


class Oft(Continuable):
    """Rotations of each layer's inputs, in blocks (Qiu et al. 2023, arXiv 2306.07280)."""

    implementation: ClassVar[str] = "finetune.adapters.peft_methods:OftMethod"
    costs: ClassVar[str] = "in (block_size - 1) / 2 a layer"
    method: Literal["oft"]
    block_size: int = Field(32, ge=2, description="Inputs of a block; it must divide every layer's inputs.")
    module_dropout: float = Field(0.0, ge=0, lt=1, description="Chance that a block is not rotated in a step.")
    target_modules: Targets = TARGETS


class TrainableTokens(Continuable):
    """The embeddings of chosen tokens and nothing else, for words that a base knows badly."""

    implementation: ClassVar[str] = "finetune.adapters.peft_methods:TrainableTokensMethod"
    costs: ClassVar[str] = "width a token"
    method: Literal["trainable_tokens"]
    tokens: list[str] = Field(min_length=1, description="Each must be one token of the vocabulary.")


class Full(AdapterSection):
    """No adapter: the model's own weights train, all or some (BitFit: Ben Zaken et al. 2022, arXiv 2106.10199)."""

    implementation: ClassVar[str] = "finetune.adapters.full:FullMethod"
    costs: ClassVar[str] = "every number: 16 bytes each with AdamW in float32, 10 with adamw_8bit"
    merges: ClassVar[str] = "merges as it is"
    loads_in: ClassVar[str] = "transformers, every engine"
    trains_base: ClassVar[bool] = True
    method: Literal["full"]
    train: list[str] = Field(
        ["*"], min_length=1, description="Patterns of the names of weights that train, such as `*.bias`."
    )
    freeze: list[str] = Field(
        [], description="Patterns of weights that stay as they are all the same, such as `*.layers.[0-9].*`."
    )


Adapter = Annotated[
    Lora
    | QaLora
    | AdaLora
    | PromptTuning
    | PrefixTuning
    | PTuning
    | Vera
    | Ia3
    | LoHa
    | LoKr
    | Oft
    | TrainableTokens
    | Full,
    Field(discriminator="method"),
]

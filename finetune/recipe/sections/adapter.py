"""Section `adapter`: the method, that is the parameters that train beside or in the base."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from finetune.recipe.sections.section import FilePath, OnResume, Section


class AdapterSection(Section):
    """Base class of all methods."""

    implementation: ClassVar[str]
    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    trains_base: ClassVar[bool] = False
    """Whether the weights of the base train; they are then stored in full precision."""
    has_rank: ClassVar[bool] = False
    """Whether each layer's update has a rank, which `modules` can set."""
    needs_full_precision: ClassVar[bool] = False
    """Whether the method reads weight values, which a quantized layer does not store."""
    standalone_by: ClassVar[str | None] = "merge"
    """The command that writes the model without a separate adapter: `merge`, `export`, or None if no command can."""
    can_be_extended: ClassVar[bool] = True
    """Whether a run can be made longer. It cannot if a schedule over all steps has shaped its first steps."""
    costs: ClassVar[str]
    """Number of trainable parameters, as a formula."""
    merges: ClassVar[str] = "merges into plain weights"
    """Result of a merge."""
    loads_in: ClassVar[str] = "PEFT"
    """Programs besides ft that load the adapter's folder."""
    method: str

    @property
    def prompt_tokens(self) -> int:
        """Positions that the method adds in front of every row."""
        return 0

    @property
    def named_tokens(self) -> list[str]:
        """Tokens of the vocabulary whose embeddings train."""
        return []


Targets = Literal["all-linear"] | Annotated[list[str], Field(min_length=1)]
TARGETS: Any = Field(
    "all-linear",
    description="Layers to adapt: `all-linear` (all but the output head), or a list of name endings.",
)


class Continuable(AdapterSection):
    """Base class of the methods that can start from an adapter of an earlier run."""

    continue_from: FilePath | None = Field(
        None,
        description="Directory of a finished run over the same base; its adapter is the initial one.",
    )


class LowRank(Continuable):
    """Base class of the methods whose update is the product of two low-rank matrices."""

    has_rank: ClassVar[bool] = True
    r: int = Field(16, ge=1, description="Rank of the update.")
    alpha: float = Field(32.0, gt=0, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the update while training.")
    target_modules: Targets = TARGETS
    modules_to_save: list[str] = Field(
        [],
        description=(
            "Modules that train in full beside the updates, such as embed_tokens or lm_head, by name endings. Engines "
            "that serve adapters refuse these: merge instead."
        ),
    )
    trainable_tokens: list[str] = Field(
        [],
        description=(
            "Tokens whose rows of the embeddings and of an untied output head train as well; each must be a single "
            "token of the vocabulary. model.new_tokens adds tokens that are not."
        ),
    )

    @property
    def named_tokens(self) -> list[str]:
        """The trainable tokens."""
        return self.trainable_tokens


class FixedRank(LowRank):
    """Base class of the methods with a constant rank."""

    iec: bool = Field(
        False,
        description=(
            "Information elastic connection of IR-QLoRA (Qin et al. 2024, arXiv 2402.05445): group means of the input "
            "and of the bottleneck skip A and B, each scaled by a trainable scalar. Merges into a plain LoRA."
        ),
    )


class Lora(FixedRank):
    """A low-rank update of each target layer (Hu et al. 2021, arXiv 2106.09685)."""

    implementation: ClassVar[str] = "finetune.adapters.lora:LoraMethod"
    costs: ClassVar[str] = "r (in + out) per layer"
    loads_in: ClassVar[str] = "PEFT, vLLM, llama.cpp (not with dora or modules_to_save)"
    method: Literal["lora"]
    rslora: bool = Field(False, description="Scale the update by alpha / sqrt(r), for large ranks (arXiv 2312.03732).")
    loraplus_ratio: float = Field(
        1.0, gt=0, description="Learning rate of B as a multiple of A's; LoRA+ uses 16 (arXiv 2402.12354)."
    )
    dora: bool = Field(False, description="Train the norm of each weight row as well (arXiv 2402.09353).")
    initialization: Literal["zero", "pissa", "olora", "loftq"] = Field(
        "zero",
        description=(
            "Initialization of the update. zero: B is zero. pissa: the weight's largest singular vectors "
            "(arXiv 2404.02948). olora: columns of its QR factors (arXiv 2406.01775). loftq: the quantization error "
            "(arXiv 2310.08659)."
        ),
    )


class QaLora(FixedRank):
    """A low-rank update that merges losslessly into a group-wise quantized base (Xu et al. 2024, arXiv 2309.14717)."""

    implementation: ClassVar[str] = "finetune.adapters.qa_lora:QaLoraMethod"
    costs: ClassVar[str] = "r (in / group_size + out) per layer"
    merges: ClassVar[str] = "merges into the quantized weights, without rounding"
    loads_in: ClassVar[str] = "PEFT over the dequantized base; merged: ft"
    method: Literal["qa_lora"]


class AdaLora(LowRank):
    """A low-rank update whose ranks are pruned by importance (Zhang et al. 2023, arXiv 2303.10512).

    Symbols in the descriptions are the paper's. Ratios of the steps are rounded down to whole steps.
    """

    implementation: ClassVar[str] = "finetune.adapters.adalora:AdaLoraMethod"
    can_be_extended: ClassVar[bool] = False
    costs: ClassVar[str] = "r (in + out + 1) per layer, and two averages of each"
    loads_in: ClassVar[str] = "PEFT, vLLM (as a LoRA of the final ranks)"
    method: Literal["adalora"]
    r: int = Field(12, ge=2, description="Initial rank of each layer, and its maximum.")
    target_r: int = Field(
        8,
        ge=1,
        description="Final mean rank of the layers; the final budget is this times the number of layers. "
        "By default 8, or two thirds of r if r is at most 8.",
    )
    orthogonal_weight: float = Field(
        0.1,
        ge=0,
        description="Weight of the orthogonality regularization of P and Q in the training loss (gamma).",
    )
    sensitivity_decay: float = Field(
        0.85, gt=0, lt=1, description="Decay of the moving average of sensitivities (beta_1)."
    )
    uncertainty_decay: float = Field(
        0.85, gt=0, lt=1, description="Decay of the moving average of uncertainties (beta_2)."
    )
    initial_ratio: float = Field(
        0.1, ge=0, lt=1, description="Fraction of all steps in which every layer keeps rank r (t_i)."
    )
    initial_steps: int | None = Field(None, ge=0, description="The same as a number of steps; replaces initial_ratio.")
    final_ratio: float = Field(
        0.4, ge=0, lt=1, description="Fraction of all steps in which the final ranks stay fixed (t_f)."
    )
    final_steps: int | None = Field(None, ge=0, description="The same as a number of steps; replaces final_ratio.")
    allocate_every: int | None = Field(
        None,
        ge=1,
        description="Steps between two updates of the ranks (Delta T); by default 1 % of the steps in between.",
    )

    def phases(self, total_steps: int) -> Phases:
        """Numbers of steps before the budget falls, while it falls, and after that."""
        initial = self.initial_steps if self.initial_steps is not None else int(self.initial_ratio * total_steps)
        final = self.final_steps if self.final_steps is not None else int(self.final_ratio * total_steps)
        return Phases(initial, total_steps - initial - final, final)

    def lack_of_steps(self, total_steps: int) -> str | None:
        """The problem with a number of steps in which ranks cannot be pruned, in words; None if they can.

        The budget must fall in at least one step, and the scores need a gradient of an earlier step.
        """
        initial, falling, final = self.phases(total_steps)
        if falling >= 1 and initial + falling >= 2:
            return None
        return f"of {total_steps} steps {initial} come before ranks are pruned and {final} after: too few are left"

    @model_validator(mode="before")
    @classmethod
    def _default_is_below_r(cls, data: Any) -> Any:
        """Choose a `target_r` that prunes something where only a small `r` is given."""
        if not isinstance(data, dict) or "target_r" in data or not isinstance(rank := data.get("r"), int):
            return data
        default = cls.model_fields["target_r"].get_default()
        return data if rank > default else {**data, "target_r": max(1, 2 * rank // 3)}


class Phases(NamedTuple):
    """Optimizer steps of AdaLoRA's three phases."""

    initial: int
    falling: int
    final: int


class SoftPrompt(AdapterSection):
    """Base class of the methods that train vectors in front of every row, and no weight of the model."""

    standalone_by: ClassVar[str | None] = "export"
    tokens: int = Field(20, ge=1, description="Length of the prompt in tokens; they count toward the context length.")

    @property
    def prompt_tokens(self) -> int:
        """Positions that the prompt takes in front of every row."""
        return self.tokens


Label = Annotated[str, Field(min_length=1)]


class PromptStart(Section):
    """Base class of the initializations of a prompt."""

    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    kind: str


class LabelsStart(PromptStart):
    """The prompt starts as class labels, each the mean over its tokens; the remaining tokens as common words."""

    kind: Literal["labels"]
    labels: list[Label] = Field(min_length=1, description="The labels, as the model shall generate them.")


class VocabularyStart(PromptStart):
    """The prompt starts as tokens sampled from the first 5,000 text tokens of the vocabulary.

    Tokenizers number tokens by frequency in their training data, as the paper's T5 tokenizer does.
    """

    kind: Literal["vocabulary"]


class TextStart(PromptStart):
    """The prompt starts as a text, repeated up to the prompt's length."""

    kind: Literal["text"]
    text: str = Field(min_length=1, description="The text, such as an instruction: `Classify the sentiment.`")


class UniformStart(PromptStart):
    """The prompt starts as values sampled uniformly from [-0.5, 0.5]."""

    kind: Literal["uniform"]


Start = Annotated[LabelsStart | VocabularyStart | TextStart | UniformStart, Field(discriminator="kind")]


class PromptTuning(SoftPrompt, Continuable):
    """Trainable embeddings in front of every row (Lester et al. 2021, arXiv 2104.08691)."""

    implementation: ClassVar[str] = "finetune.adapters.prompt_tuning:PromptTuningMethod"
    costs: ClassVar[str] = "tokens x width in total"
    merges: ClassVar[str] = "does not merge (ft export writes it as vocabulary tokens)"
    loads_in: ClassVar[str] = "PEFT; exported: every engine"
    method: Literal["prompt_tuning"]
    tokens: int = Field(100, ge=1, description="Length of the prompt in tokens; the paper gains little beyond 20.")
    start: Start = Field(VocabularyStart(kind="vocabulary"), description="Initialization of the prompt.")


class PTuning(SoftPrompt):
    """Prompt tuning with a prompt encoder during training (Liu et al. 2021, arXiv 2103.10385)."""

    implementation: ClassVar[str] = "finetune.adapters.p_tuning:PTuningMethod"
    costs: ClassVar[str] = "tokens x width in total, and a prompt encoder while training"
    merges: ClassVar[str] = "does not merge (ft export writes it as vocabulary tokens)"
    loads_in: ClassVar[str] = "PEFT; exported: every engine"
    method: Literal["p_tuning"]
    encoder: Literal["lstm", "mlp"] = Field(
        "lstm",
        description=(
            "Prompt encoder that produces the embeddings while training. lstm: a bidirectional LSTM and an MLP, as in "
            "the paper. mlp: an MLP alone."
        ),
    )
    hidden_size: int | None = Field(
        None, ge=1, description="Hidden size of the prompt encoder; by default that of the model's embeddings."
    )


class PrefixTuning(SoftPrompt):
    """Trainable keys and values in front of every row in every layer (Li and Liang 2021, arXiv 2101.00190)."""

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
            "Hidden size of the MLP that reparameterizes keys and values while training, as in the paper; null trains "
            "them directly, starting from those of common words."
        ),
    )


class Vera(Continuable):
    """Two vectors per layer around random matrices shared by all layers (Kopiczko et al. 2024, arXiv 2310.11454)."""

    implementation: ClassVar[str] = "finetune.adapters.peft_methods:VeraMethod"
    costs: ClassVar[str] = "r + out per layer, beside r (in + out) frozen ones that all layers share"
    method: Literal["vera"]
    r: int = Field(256, ge=1, description="Rank of the shared matrices.")
    initial: float = Field(0.1, gt=0, description="Initial value of the vector d.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the update while training.")
    projection_seed: int = Field(0, ge=0, description="Seed of the shared matrices.")
    target_modules: Targets = TARGETS


class Ia3(Continuable):
    """A trainable scale per output, or per input of feed-forward layers (Liu et al. 2022, arXiv 2205.05638)."""

    implementation: ClassVar[str] = "finetune.adapters.peft_methods:Ia3Method"
    costs: ClassVar[str] = "out or in per layer"
    needs_full_precision: ClassVar[bool] = True
    method: Literal["ia3"]
    target_modules: list[str] = Field(
        ["k_proj", "v_proj", "down_proj"], min_length=1, description="Layers with scales, by name endings."
    )
    feedforward_modules: list[str] = Field(
        ["down_proj"],
        description="Those of them whose inputs are scaled instead of their outputs; by default down_proj, if named.",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_is_among_targets(cls, data: Any) -> Any:
        """Leave the default out of `feedforward_modules` where `target_modules` does not name it."""
        if not isinstance(data, dict) or "feedforward_modules" in data or "target_modules" not in data:
            return data
        named = data["target_modules"]
        default = cls.model_fields["feedforward_modules"].get_default()
        among = [name for name in default if isinstance(named, list) and name in named]
        return {**data, "feedforward_modules": among}


class FactoredUpdate(Continuable):
    """Base class of the methods whose update is another product of small factors than LoRA's."""

    needs_full_precision: ClassVar[bool] = True
    r: int = Field(8, ge=1, description="Rank of the factors; of LoKr, of the larger factor.")
    alpha: float = Field(8.0, gt=0, description="The update is scaled by alpha / r.")
    module_dropout: float = Field(0.0, ge=0, lt=1, description="Probability that a layer has no update in a step.")
    target_modules: Targets = TARGETS


class LoHa(FactoredUpdate):
    """The entrywise product of two low-rank updates (Hyeon-Woo et al. 2022, arXiv 2108.06098)."""

    implementation: ClassVar[str] = "finetune.adapters.peft_methods:LoHaMethod"
    costs: ClassVar[str] = "2 r (in + out) per layer"
    method: Literal["loha"]


class LoKr(FactoredUpdate):
    """A Kronecker product as the update (Yeh et al. 2024, arXiv 2309.14859)."""

    implementation: ClassVar[str] = "finetune.adapters.peft_methods:LoKrMethod"
    costs: ClassVar[str] = "fewer than LoRA of the same rank"
    method: Literal["lokr"]


class Oft(Continuable):
    """Block-diagonal rotations of each layer's inputs (Qiu et al. 2023, arXiv 2306.07280)."""

    implementation: ClassVar[str] = "finetune.adapters.peft_methods:OftMethod"
    costs: ClassVar[str] = "in (block_size - 1) / 2 per layer"
    method: Literal["oft"]
    block_size: int = Field(32, ge=2, description="Inputs per block; it must divide every layer's input size.")
    module_dropout: float = Field(0.0, ge=0, lt=1, description="Probability that a block is not rotated in a step.")
    target_modules: Targets = TARGETS


class TrainableTokens(Continuable):
    """The rows of selected tokens in embeddings and output head, for words that are rare in the base's training."""

    implementation: ClassVar[str] = "finetune.adapters.peft_methods:TrainableTokensMethod"
    costs: ClassVar[str] = "width per token, twice with an untied output head"
    method: Literal["trainable_tokens"]
    tokens: list[str] = Field(
        [],
        description=(
            "The tokens; each must be a single token of the vocabulary. Those of model.new_tokens train as well."
        ),
    )

    @property
    def named_tokens(self) -> list[str]:
        """The tokens."""
        return self.tokens


class Full(AdapterSection):
    """No adapter: all or some weights of the model train (BitFit: Ben Zaken et al. 2022, arXiv 2106.10199)."""

    implementation: ClassVar[str] = "finetune.adapters.full:FullMethod"
    costs: ClassVar[str] = "every parameter: 16 bytes each with AdamW in float32, 10 with adamw_8bit"
    merges: ClassVar[str] = "merges as it is"
    loads_in: ClassVar[str] = "transformers, every engine"
    trains_base: ClassVar[bool] = True
    method: Literal["full"]
    train: list[str] = Field(
        ["*"], min_length=1, description="Name patterns of the weights that train, such as `*.bias`."
    )
    freeze: list[str] = Field(
        [],
        description="Name patterns of weights that stay frozen although `train` matches, such as `*.layers.[0-9].*`.",
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

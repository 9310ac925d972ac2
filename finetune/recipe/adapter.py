"""Section `adapter`: what is trained on top of the base."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from finetune.recipe.section import Section


class AdapterSection(Section):
    """Base of all methods."""

    implementation: ClassVar[str]
    trains_base: ClassVar[bool] = False
    """Whether the base's own weights train; they then keep a full-precision copy."""
    has_rank: ClassVar[bool] = False
    """Whether layers have updates of some rank, which `modules` can set."""
    standalone_by: ClassVar[str | None] = "merge"
    """The command that writes the trained model so that it needs no adapter; None where there is no such form."""
    method: str

    @property
    def prompt_tokens(self) -> int:
        """Places that the method takes in front of every row."""
        return 0


class LowRank(AdapterSection):
    """Base of the methods whose update is a product of two thin matrices."""

    has_rank: ClassVar[bool] = True
    r: int = Field(16, ge=1, description="Rank of the update.")
    alpha: float = Field(32.0, gt=0, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the update while training.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Layers that get an update: `all-linear` (all but the output head), or a list of name endings.",
    )
    iec: bool = Field(
        False,
        description=(
            "Information elastic connection of IR-QLoRA (Qin et al. 2024, arXiv 2402.05445): means of input and "
            "bottleneck go around the two matrices, each times a learned number. Folds into a plain LoRA."
        ),
    )


class Lora(LowRank):
    """A low-rank update beside each target layer (Hu et al. 2021, arXiv 2106.09685)."""

    implementation: ClassVar[str] = "finetune.adapters.lora:LoraMethod"
    method: Literal["lora"]


class QaLora(LowRank):
    """A low-rank update that a group-wise quantized base takes up without loss (Xu et al. 2024, arXiv 2309.14717)."""

    implementation: ClassVar[str] = "finetune.adapters.qa_lora:QaLoraMethod"
    method: Literal["qa_lora"]


class SoftPrompt(AdapterSection):
    """Base of the methods that train what the model reads before every row, and nothing of the model."""

    standalone_by: ClassVar[str | None] = "export"
    tokens: int = Field(20, ge=1, description="Length of the prompt, in tokens of the context that it takes.")

    @property
    def prompt_tokens(self) -> int:
        """Places that the prompt takes in front of every row."""
        return self.tokens


Label = Annotated[str, Field(min_length=1)]


class LabelsStart(Section):
    """The prompt starts as class labels, each the mean over its tokens; what is left, as common words."""

    kind: Literal["labels"]
    labels: list[Label] = Field(min_length=1, description="The labels, as the model is to write them.")


class VocabularyStart(Section):
    """The prompt starts as tokens drawn from the first 5,000 of the vocabulary that are text.

    Tokenizers number their tokens by how common they were where they were trained, as T5's of the paper does.
    """

    kind: Literal["vocabulary"]


class TextStart(Section):
    """The prompt starts as a text, repeated until it is as long."""

    kind: Literal["text"]
    text: str = Field(min_length=1, description="Such as an instruction: `Classify the sentiment.`")


class UniformStart(Section):
    """The prompt starts as numbers drawn evenly from [-0.5, 0.5]."""

    kind: Literal["uniform"]


Start = Annotated[LabelsStart | VocabularyStart | TextStart | UniformStart, Field(discriminator="kind")]


class PromptTuning(SoftPrompt):
    """Vectors in front of every row's embeddings (Lester et al. 2021, arXiv 2104.08691)."""

    implementation: ClassVar[str] = "finetune.adapters.prompt_tuning:PromptTuningMethod"
    method: Literal["prompt_tuning"]
    tokens: int = Field(100, ge=1, description="Length of the prompt; the paper gains little beyond 20.")
    initialization: Start = Field(VocabularyStart(kind="vocabulary"), description="What the prompt starts as.")


class PTuning(SoftPrompt):
    """Prompt tuning through a small network that ties the vectors together (Liu et al. 2021, arXiv 2103.10385)."""

    implementation: ClassVar[str] = "finetune.adapters.p_tuning:PTuningMethod"
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


class Full(AdapterSection):
    """No adapter: every weight of the model trains."""

    implementation: ClassVar[str] = "finetune.adapters.full:FullMethod"
    trains_base: ClassVar[bool] = True
    method: Literal["full"]


Adapter = Annotated[Lora | QaLora | PromptTuning | PrefixTuning | PTuning | Full, Field(discriminator="method")]

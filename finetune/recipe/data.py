"""Section `data`: where rows come from, what they look like, which of their tokens are trained."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from finetune.recipe.section import FilePath, Section

Delimiter = Literal["comma", "semicolon", "tab", "pipe"]
TextSplit = Literal["file", "line", "paragraph"]


class Hub(Section):
    """A data set on the hub."""

    name: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="Its id: `org/name`.")
    subset: str | None = Field(None, description="Which of its configurations; by default the only one.")
    split: str = Field("train", description="Which of its splits; `train[:1000]` is a part of one.")
    revision: str | None = Field(None, description="Branch, tag or commit. Pin a commit to make a run repeatable.")
    stream: bool = Field(False, description="Read over the network without keeping a copy in the cache.")


class SourceSection(Section):
    """Where rows come from and the names of their columns."""

    implementation: ClassVar[str]
    path: FilePath | None = Field(
        None,
        description=(
            "A file, a pattern such as `data/*.jsonl`, or a folder of .jsonl, .json, .csv, .tsv or .parquet files; "
            "all but the last may be compressed: .gz, .bz2, .xz, .zst."
        ),
    )
    hub: Hub | None = Field(None, description="A data set on the hub, instead of `path`.")
    delimiter: Delimiter | None = Field(
        None, description="What separates the cells of a CSV file; by default it is seen from the header."
    )
    rows: int | None = Field(
        None, ge=1, description="Take this many rows of the source, drawn by `training.seed`; by default all of them."
    )
    weight: float | None = Field(
        None,
        gt=0,
        description=(
            "Share of the source among all, relative to the other weights. Rows are drawn without repetition until "
            "the source that runs out first relative to its weight is used up."
        ),
    )

    @property
    def place(self) -> str:
        """The source in a word, for messages."""
        return self.path or (f"{self.hub.name}[{self.hub.split}]" if self.hub else "")


class ChatSource(SourceSection):
    """Rows with a list of messages, each `{"role": ..., "content": ...}`."""

    implementation: ClassVar[str] = "finetune.data.formats.chat:ChatFormat"
    format: Literal["chat"]
    messages: str = Field("messages", description="Column with the list of messages.")


class InstructionSource(SourceSection):
    """Rows with an instruction, an optional input, and the output to learn."""

    implementation: ClassVar[str] = "finetune.data.formats.instruction:InstructionFormat"
    format: Literal["instruction"]
    instruction: str = Field("instruction", description="Column with the instruction.")
    input: str = Field("input", description="Column with further input; may be absent or empty.")
    output: str = Field("output", description="Column with the answer.")
    system: str | None = Field(None, description="A system message to put before every row.")


class CompletionSource(SourceSection):
    """Rows with a prompt and its completion, as plain text or through the chat template."""

    implementation: ClassVar[str] = "finetune.data.formats.completion:CompletionFormat"
    format: Literal["completion"]
    prompt: str = Field("prompt", description="Column with the prompt.")
    completion: str = Field("completion", description="Column with the completion.")
    chat_template: bool = Field(
        False, description="Render as a user's turn and the assistant's; otherwise the texts are joined as they are."
    )


class TextSource(SourceSection):
    """Rows of plain text, every token of which is trained."""

    implementation: ClassVar[str] = "finetune.data.formats.text:TextFormat"
    format: Literal["text"]
    text: str = Field("text", description="Column with the text.")
    split: TextSplit = Field(
        "file", description="What of a .txt or .md file is a row: the file, a line, or a paragraph up to a blank line."
    )


Source = Annotated[ChatSource | InstructionSource | CompletionSource | TextSource, Field(discriminator="format")]


class Data(Section):
    """Training and held-out rows."""

    train: list[Source] = Field(min_length=1, description="Sources of training rows, joined or mixed by weight.")
    validation: list[Source] = Field([], description="Sources of held-out rows.")
    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="Share of the training rows to hold out instead, drawn by the seed."
    )
    max_length: int = Field(2048, ge=8, description="Longest row in tokens.")
    overlength: Literal["error", "drop"] = Field(
        "error", description="What to do with a longer row: stop, or leave the row out and count it."
    )
    train_on: Literal["assistant", "last_turn", "all"] = Field(
        "assistant",
        description=(
            "Tokens that are trained: every answer of the assistant, the last answer only, or all tokens. "
            "The end of a trained turn is always trained with it."
        ),
    )

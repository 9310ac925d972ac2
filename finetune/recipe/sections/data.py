"""Section `data`: where rows come from, what they look like, which of their tokens are trained."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from finetune.recipe.sections.section import FilePath, OnResume, Section

Delimiter = Literal["comma", "semicolon", "tab", "pipe"]


class _NamesColumn:
    """Marks a key of a source that names one of its columns."""


ColumnName = Annotated[str, _NamesColumn()]
AnswerColumn = Annotated[
    str | None,
    _NamesColumn(),
    Field(
        description=(
            "Column with the answer where it stands apart, such as `chosen` of preference data: a text, a message or a "
            "list of them. The conversation before it is its prompt then, and not trained."
        ),
    ),
]
TextSplit = Literal["file", "line", "paragraph"]


class Hub(Section):
    """A data set on the hub; that its rows are the same is checked by their hashes, as for files."""

    on_resume: ClassVar[OnResume] = OnResume.MAY_CHANGE
    name: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="Its id: `org/name`.")
    subset: str | None = Field(None, description="Which of its configurations; by default the only one.")
    split: str = Field("train", description="Which of its splits; `train[:1000]` is a part of one.")
    revision: str | None = Field(None, description="Branch, tag or commit. Pin a commit to make a run repeatable.")
    stream: bool = Field(False, description="Read over the network without keeping a copy in the cache.")


class SourceSection(Section):
    """Where rows come from and the names of their columns."""

    implementation: ClassVar[str]
    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    path: Annotated[FilePath | None, OnResume.MAY_CHANGE] = Field(
        None,
        description=(
            "A file, a pattern such as `data/*.jsonl`, or a folder of .jsonl, .json, .csv, .tsv or .parquet files; "
            "all but the last may be compressed: .gz, .bz2, .xz, .zst."
        ),
    )
    hub: Annotated[Hub | None, OnResume.MAY_CHANGE] = Field(
        None, description="A data set on the hub, instead of `path`."
    )
    delimiter: Delimiter | None = Field(
        None, description="What separates the cells of a CSV file; by default it is seen from the header."
    )
    rows: int | None = Field(
        None,
        ge=1,
        description=(
            "Take this many rows of the source, drawn by `training.seed`; by default all of them. "
            "Of a stream the first ones are taken."
        ),
    )
    weight: float | None = Field(
        None,
        gt=0,
        description=(
            "Share of the source among all, relative to the other weights. Rows are drawn without repetition until "
            "the source that runs out first relative to its weight is used up."
        ),
    )

    @classmethod
    def column_keys(cls) -> list[str]:
        """Keys that name a column."""
        fields = cls.model_fields.items()
        return [key for key, field in fields if any(isinstance(each, _NamesColumn) for each in field.metadata)]

    @property
    def place(self) -> str:
        """The source in a word, for messages."""
        return self.path or (f"{self.hub.name}[{self.hub.split}]" if self.hub else "")


class AutoSource(SourceSection):
    """Rows whose format is told by the columns of the first one."""

    implementation: ClassVar[str] = "finetune.data.formats.auto:AutoFormat"
    format: Literal["auto"] = "auto"


class ChatSource(SourceSection):
    """Rows with a list of messages, each `{"role": ..., "content": ...}`, tool calls included."""

    implementation: ClassVar[str] = "finetune.data.formats.chat:ChatFormat"
    format: Literal["chat"]
    messages: ColumnName = Field("messages", description="Column with the list of messages.")
    answer: AnswerColumn = None
    tools: ColumnName = Field("tools", description="Column with the tools that may be called; may be absent.")


class ShareGptSource(SourceSection):
    """Rows with a list of turns, each `{"from": ..., "value": ...}`."""

    implementation: ClassVar[str] = "finetune.data.formats.sharegpt:ShareGptFormat"
    format: Literal["sharegpt"]
    conversations: ColumnName = Field("conversations", description="Column with the list of turns.")
    answer: AnswerColumn = None
    role_key: str = Field("from", description="Key of a turn with its role.")
    content_key: str = Field("value", description="Key of a turn with its text.")
    system: ColumnName = Field("system", description="Column with a system message; may be absent.")
    tools: ColumnName = Field("tools", description="Column with the tools that may be called; may be absent.")
    user_roles: list[str] = Field(["human", "user"], description="Names of the user's role.")
    assistant_roles: list[str] = Field(
        ["gpt", "assistant", "chatgpt", "model"], description="Names of the assistant's role."
    )
    system_roles: list[str] = Field(["system"], description="Names of the system's role.")
    call_roles: list[str] = Field(
        ["function_call", "tool_call"], description="Names of the role whose text is the JSON of a tool call."
    )
    tool_roles: list[str] = Field(
        ["observation", "tool", "tool_response", "function_response"], description="Names of a tool's role."
    )


class InstructionSource(SourceSection):
    """Rows with an instruction, an optional input, and the output to learn, as in the Alpaca data set."""

    implementation: ClassVar[str] = "finetune.data.formats.instruction:InstructionFormat"
    format: Literal["instruction"]
    instruction: ColumnName = Field("instruction", description="Column with the instruction.")
    input: ColumnName = Field("input", description="Column with further input; may be absent or empty.")
    output: ColumnName = Field("output", description="Column with the answer.")
    history: ColumnName = Field(
        "history", description="Column with earlier pairs of instruction and answer; may be absent."
    )
    system: str | None = Field(None, description="A system message to put before every row.")
    system_column: ColumnName = Field(
        "system", description="Column with a system message of the row's own, instead; may be absent or empty."
    )


class CompletionSource(SourceSection):
    """Rows with a prompt and its completion, as plain text or through the chat template."""

    implementation: ClassVar[str] = "finetune.data.formats.completion:CompletionFormat"
    format: Literal["completion"]
    prompt: ColumnName = Field("prompt", description="Column with the prompt.")
    completion: ColumnName = Field("completion", description="Column with the completion.")
    chat_template: bool = Field(
        False, description="Render as a user's turn and the assistant's; otherwise the texts are joined as they are."
    )


class QaSource(SourceSection):
    """Rows with a question, an optional context, and answers: the first is trained, all of them count as right."""

    implementation: ClassVar[str] = "finetune.data.formats.qa:QaFormat"
    format: Literal["qa"]
    context: ColumnName = Field(
        "context", description="Column with the text that holds the answer; may be absent or empty."
    )
    question: ColumnName = Field("question", description="Column with the question.")
    answers: ColumnName = Field(
        "answers", description='Column with the answers: a text, a list of texts, or `{"text": [...]}` as in SQuAD.'
    )
    system: str | None = Field(None, description="A system message to put before every row.")


class MultipleChoiceSource(SourceSection):
    """Rows with a question, several choices, and which of them is right, as in MMLU and ARC."""

    implementation: ClassVar[str] = "finetune.data.formats.multiple_choice:MultipleChoiceFormat"
    format: Literal["multiple_choice"]
    context: ColumnName = Field(
        "context", description="Column with a text to put before the question; may be absent or empty."
    )
    question: ColumnName = Field("question", description="Column with the question.")
    choices: ColumnName = Field(
        "choices",
        description='Column with the choices: a list of texts, or `{"text": [...], "label": [...]}` as in ARC.',
    )
    answer: ColumnName = Field(
        "answer", description="Column with the right choice: its number from 0, its letter or label, or its text."
    )
    answer_with: Literal["letter", "text"] = Field(
        "letter", description="What the model learns to answer with: the letter of the choice, or its text."
    )
    system: str | None = Field(None, description="A system message to put before every row.")


class ClassificationSource(SourceSection):
    """Rows with a text and its label."""

    implementation: ClassVar[str] = "finetune.data.formats.classification:ClassificationFormat"
    format: Literal["classification"]
    text: ColumnName = Field("text", description="Column with the text.")
    label: ColumnName = Field("label", description="Column with the label: its name, or its number in `labels`.")
    labels: list[str] = Field([], description="Names of the labels, in the order of their numbers.")
    system: str | None = Field(
        None, description="A system message to put before every row; `{labels}` in it stands for their names."
    )


class TextSource(SourceSection):
    """Rows of plain text, every token of which is trained."""

    implementation: ClassVar[str] = "finetune.data.formats.text:TextFormat"
    format: Literal["text"]
    text: ColumnName = Field("text", description="Column with the text.")
    split: TextSplit | None = Field(
        None,
        description=(
            "What of a .txt or .md file is a row: the file (default), a line, or a paragraph up to a blank line."
        ),
    )


class TokenizedSource(SourceSection):
    """Rows of token ids, all of which are trained unless labels or a mask say otherwise."""

    implementation: ClassVar[str] = "finetune.data.formats.tokenized:TokenizedFormat"
    format: Literal["tokenized"]
    input_ids: ColumnName = Field("input_ids", description="Column with the token ids.")
    labels: ColumnName = Field(
        "labels", description="Column with the ids again, and -100 where not trained; may be absent."
    )
    mask: ColumnName = Field("loss_mask", description="Column with 1 where trained and 0 elsewhere; may be absent.")


Source = Annotated[
    AutoSource
    | ChatSource
    | ShareGptSource
    | InstructionSource
    | CompletionSource
    | QaSource
    | MultipleChoiceSource
    | ClassificationSource
    | TextSource
    | TokenizedSource,
    Field(discriminator="format"),
]


class Data(Section):
    """Training and held-out rows."""

    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    train: list[Source] = Field(min_length=1, description="Sources of training rows, joined or mixed by weight.")
    validation: list[Source] = Field([], description="Sources of held-out rows.")
    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="Share of the training rows to hold out instead, drawn by the seed."
    )
    max_length: int = Field(2048, ge=8, description="Longest row in tokens.")
    overlength: Literal["error", "drop", "truncate_prompt", "truncate", "split"] = Field(
        "error",
        description=(
            "What to do with a longer row: stop; leave it out; cut the beginning of its prompt, but not the system "
            "message and the tools before the first user's message; cut its end; "
            "or make several rows of it, which only text without a prompt allows. What is cut is counted."
        ),
    )
    train_on: Literal["assistant", "last_turn", "completion", "all"] = Field(
        "assistant",
        description=(
            "Tokens that are trained: every answer of the assistant, the last answer only, every answer after the "
            "last user's message, or all tokens. The end of a trained turn is always trained with it."
        ),
    )
    split_turns: bool = Field(
        False,
        description=(
            "Make a row of its own of every answer, with the turns before it as its prompt: "
            "for chat templates that render the last turn in another way than earlier ones."
        ),
    )
    on_bad_row: Literal["error", "drop"] = Field(
        "error",
        description="What to do with a row without target tokens. error: stop. drop: drop the row and count it.",
    )
    max_dropped: float = Field(
        0.01, ge=0, le=1, description="Stop if a larger share of the rows would be left out, for whatever cause."
    )
    workers: Annotated[int | None, OnResume.MAY_CHANGE] = Field(
        None, ge=1, description="Processes that tokenize many rows; by default one for each core."
    )

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _format_is_auto_by_default(cls, sources: Any) -> Any:
        """A tagged union has no default tag of its own."""
        if not isinstance(sources, list):
            return sources
        return [{"format": "auto", **source} if isinstance(source, dict) else source for source in sources]

"""Section `data`: sources of rows, their format, and the target tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from finetune.recipe.sections.prompt_text import ALPACA, PromptText, TextParts
from finetune.recipe.sections.section import FilePath, OnResume, Section

Delimiter = Literal["comma", "semicolon", "tab", "pipe"]


class _NamesColumn:
    """Marks a key of a source whose value is a column name."""


ColumnName = Annotated[str, _NamesColumn()]
AnswerColumn = Annotated[
    str | None,
    _NamesColumn(),
    Field(
        description=(
            "Column with the answer if it is separate, such as `chosen` of preference data: a text, a message or a "
            "list of messages. The conversation is then its prompt, without target tokens."
        ),
    ),
]
TextSplit = Literal["file", "line", "paragraph"]

SYSTEM_COLUMNS = ("system", "system_prompt")
"""Columns with a system message, unless a source names another one."""

NOT_ARGUMENTS = frozenset((
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages",
    "padding", "return_dict", "return_assistant_tokens_mask", "return_tensors", "sanitize_control_tokens",
    "tokenize", "tokenizer_kwargs", "tools", "truncation",
))  # fmt: skip
"""Names that rendering uses itself, so that no variable of a chat template can have them."""


def not_arguments(names: Iterable[Any]) -> list[str]:
    """Those of the names that no variable of a chat template can have."""
    return [str(name) for name in names if not str(name).isidentifier() or name in NOT_ARGUMENTS]


class Hub(Section):
    """A data set on the hub; row hashes detect changed rows, as for files."""

    on_resume: ClassVar[OnResume] = OnResume.MAY_CHANGE
    name: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="Its id: `org/name`.")
    subset: str | None = Field(None, description="Configuration of the data set; by default the only one.")
    split: str = Field("train", description="Split of the data set, or a part of one: `train[:1000]`.")
    revision: str | None = Field(None, description="Branch, tag or commit. Pin a commit to make a run repeatable.")
    stream: bool = Field(False, description="Read over the network without a copy in the cache.")


class SourceSection(Section):
    """A source of rows and the names of its columns."""

    implementation: ClassVar[str]
    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    path: Annotated[FilePath | None, OnResume.MAY_CHANGE] = Field(
        None,
        description=(
            "A file, a pattern such as `data/*.jsonl`, or a folder of .jsonl, .json, .csv, .tsv, .parquet or .arrow "
            "files; all but the last two may be compressed: .gz, .bz2, .xz, .zst."
        ),
    )
    hub: Annotated[Hub | None, OnResume.MAY_CHANGE] = Field(
        None, description="A data set on the hub, instead of `path`."
    )
    delimiter: Delimiter | None = Field(
        None, description="Separator of the cells of a CSV file; by default detected from the header."
    )
    rows: int | None = Field(
        None,
        ge=1,
        description=(
            "Number of rows to use, sampled with `data.sample_seed`; by default all. Of a stream, the first ones."
        ),
    )
    max_rows: int | None = Field(
        None, ge=1, description="Use at most so many rows, sampled as `rows`; all if the source has fewer."
    )
    weight: float | None = Field(
        None,
        gt=0,
        description=(
            "Weight of the source in the mixture, relative to the other weights. Rows are sampled without replacement "
            "until the first source is exhausted."
        ),
    )

    @model_validator(mode="after")
    def _has_one_number_of_rows(self) -> Self:
        if self.rows is not None and self.max_rows is not None:
            raise ValueError("`rows` is an exact number and `max_rows` the largest: leave one of them out")
        return self

    @classmethod
    def column_keys(cls) -> list[str]:
        """Keys whose value is a column name."""
        fields = cls.model_fields.items()
        return [key for key, field in fields if any(isinstance(each, _NamesColumn) for each in field.metadata)]

    @property
    def prompt_text(self) -> str | PromptText | None:
        """The form of its prompts, where the source sets one: a family of chat templates, or a text."""
        return None

    @property
    def place(self) -> str:
        """The source in short, for messages."""
        return self.path or (f"{self.hub.name}[{self.hub.split}]" if self.hub else "")


class AutoSource(SourceSection):
    """Rows whose format is detected from the columns of the first row."""

    implementation: ClassVar[str] = "finetune.data.formats.auto:AutoFormat"
    format: Literal["auto"] = "auto"


class ConversationSource(SourceSection):
    """A source whose rows become conversations."""

    @property
    def needs_chat_template(self) -> bool:
        """Whether a chat template renders the rows."""
        return True

    system_column: ColumnName = Field(
        SYSTEM_COLUMNS[0],
        description=(
            "Column with a system message per row, which replaces `system`; may be absent or empty. Its default stands "
            "for the column `system_prompt` too."
        ),
    )
    system: str | None = Field(None, description="System message of every row that has none of its own.")


class ChatSource(ConversationSource):
    """Rows with a list of messages, each `{"role": ..., "content": ...}`, tool calls included."""

    implementation: ClassVar[str] = "finetune.data.formats.chat:ChatFormat"
    format: Literal["chat"]
    messages: ColumnName = Field("messages", description="Column with the list of messages.")
    answer: AnswerColumn = None
    tools: ColumnName = Field("tools", description="Column with the callable tools; may be absent.")


class ShareGptSource(ConversationSource):
    """Rows with a list of turns, each `{"from": ..., "value": ...}`."""

    implementation: ClassVar[str] = "finetune.data.formats.sharegpt:ShareGptFormat"
    format: Literal["sharegpt"]
    conversations: ColumnName = Field("conversations", description="Column with the list of turns.")
    answer: AnswerColumn = None
    role_key: str = Field("from", description="Key of a turn with its role.")
    content_key: str = Field("value", description="Key of a turn with its text.")
    tools: ColumnName = Field("tools", description="Column with the callable tools; may be absent.")
    user_roles: list[str] = Field(["human", "user"], description="Names of the user's role.")
    assistant_roles: list[str] = Field(
        ["gpt", "assistant", "chatgpt", "model"], description="Names of the assistant's role."
    )
    system_roles: list[str] = Field(["system"], description="Names of the system's role.")
    call_roles: list[str] = Field(
        ["function_call", "tool_call"], description="Names of the role with tool calls in JSON."
    )
    tool_roles: list[str] = Field(
        ["observation", "tool", "tool_response", "function_response"], description="Names of a tool's role."
    )

    @model_validator(mode="before")
    @classmethod
    def _system_was_a_column(cls, values: Any) -> Any:
        """Read `system` with a column name, one word, as `system_column`: earlier versions had it in its place."""
        if not isinstance(values, dict) or not isinstance(values.get("system"), str) or "system_column" in values:
            return values  # pydantic reports what is wrong
        if not re.fullmatch(r"[\w.-]+", values["system"]):
            return values
        return {"system_column" if key == "system" else key: value for key, value in values.items()}


class InstructionSource(ConversationSource):
    """Rows with an instruction, an optional input and a target output, as in the Alpaca data set."""

    implementation: ClassVar[str] = "finetune.data.formats.instruction:InstructionFormat"
    format: Literal["instruction"]
    instruction: ColumnName = Field("instruction", description="Column with the instruction.")
    input: ColumnName = Field("input", description="Column with further input; may be absent or empty.")
    output: ColumnName = Field("output", description="Column with the answer.")
    history: ColumnName = Field(
        "history", description="Column with earlier pairs of instruction and answer; may be absent."
    )
    template: str | None = Field(
        None,
        description=(
            "Form of the prompts in place of the chat template, for a base that has none: `alpaca` (Alpaca's wording), "
            "or a text with the placeholders {instruction}, {input} and {system}; the output follows behind it. It is "
            "the chat template of the run, for all its rows, and is saved with adapter, merged model and exports."
        ),
    )
    template_without_input: str | None = Field(
        None, description="The text for rows without an input, where `template` is a text with {input}."
    )

    @field_validator("template", "template_without_input")
    @classmethod
    def _has_placeholders(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text is not None and text != ALPACA:
            parts = TextParts.of(text)
            if info.field_name == "template_without_input" and parts.mark is not None:
                raise ValueError("this is the text of rows without an input: leave {input} out")
        elif text is not None and info.field_name == "template_without_input":
            raise ValueError("expected a text with {instruction}: `template: alpaca` has both wordings")
        return text

    @property
    def _text_has_input(self) -> bool:
        return self.template not in (None, ALPACA) and TextParts.of(self.template).mark is not None

    @property
    def needs_input(self) -> bool:
        """Whether the template has no text for rows without an input."""
        return self._text_has_input and self.template_without_input is None

    @model_validator(mode="after")
    def _second_text_has_a_use(self) -> Self:
        if self.template_without_input is not None and not self._text_has_input:
            raise ValueError("`template_without_input` belongs to a `template` with {input}")
        return self

    @property
    def prompt_text(self) -> str | PromptText | None:
        """See the base class."""
        return (
            self.template if self.template in (None, ALPACA) else PromptText(self.template, self.template_without_input)
        )


class CompletionSource(ConversationSource):
    """Rows with a prompt and its completion, as plain text or through the chat template."""

    implementation: ClassVar[str] = "finetune.data.formats.completion:CompletionFormat"
    format: Literal["completion"]
    prompt: ColumnName = Field("prompt", description="Column with the prompt.")
    completion: ColumnName = Field("completion", description="Column with the completion.")
    chat_template: bool = Field(
        False, description="Render as a user turn and an assistant turn; otherwise the two texts are concatenated."
    )

    @property
    def needs_chat_template(self) -> bool:
        """See the base class."""
        return self.chat_template

    @model_validator(mode="after")
    def _system_is_rendered(self) -> Self:
        if self.system is not None and not self.chat_template:
            raise ValueError("`system` has no effect on plain text: set `chat_template: true`, or leave it out")
        return self


class QaSource(ConversationSource):
    """Rows with a question, an optional context, and answers: the first is the target, all count as correct."""

    implementation: ClassVar[str] = "finetune.data.formats.qa:QaFormat"
    format: Literal["qa"]
    context: ColumnName = Field(
        "context", description="Column with the passage that holds the answer; may be absent or empty."
    )
    question: ColumnName = Field("question", description="Column with the question.")
    answers: ColumnName = Field(
        "answers", description='Column with the answers: a text, a list of texts, or `{"text": [...]}` as in SQuAD.'
    )


class MultipleChoiceSource(ConversationSource):
    """Rows with a question, several choices and the correct one, as in MMLU and ARC."""

    implementation: ClassVar[str] = "finetune.data.formats.multiple_choice:MultipleChoiceFormat"
    format: Literal["multiple_choice"]
    context: ColumnName = Field(
        "context", description="Column with a text before the question; may be absent or empty."
    )
    question: ColumnName = Field("question", description="Column with the question.")
    choices: ColumnName = Field(
        "choices",
        description='Column with the choices: a list of texts, or `{"text": [...], "label": [...]}` as in ARC.',
    )
    answer: ColumnName = Field(
        "answer",
        description=(
            "Column with the correct choice: its index from 0, its letter or label, or its text. Digits in text, as in "
            "a CSV file, are an index unless they are a choice or its label."
        ),
    )
    answer_with: Literal["letter", "text"] = Field(
        "letter", description="Target answer: the letter of the choice, or its text."
    )


class ClassificationSource(ConversationSource):
    """Rows with a text and its label."""

    implementation: ClassVar[str] = "finetune.data.formats.classification:ClassificationFormat"
    format: Literal["classification"]
    text: ColumnName = Field("text", description="Column with the text.")
    label: ColumnName = Field(
        "label",
        description=(
            "Column with the label: its name, or its index in `labels`. Digits in text, as in a CSV file, are an index "
            "unless a label's name has digits only."
        ),
    )
    labels: list[str] = Field([], description="Names of the labels, in the order of their indices.")
    system: str | None = Field(
        None, description="System message of every row; `{labels}` is replaced by the label names."
    )


class TextSource(SourceSection):
    """Rows of plain text; every token is a target."""

    implementation: ClassVar[str] = "finetune.data.formats.text:TextFormat"
    format: Literal["text"]
    text: ColumnName = Field("text", description="Column with the text.")
    split: TextSplit | None = Field(
        None,
        description=("Row of a .txt or .md file: the file (default), a line, or a paragraph up to a blank line."),
    )


class TokenizedSource(SourceSection):
    """Rows of token ids; every token is a target unless labels or a mask exclude it."""

    implementation: ClassVar[str] = "finetune.data.formats.tokenized:TokenizedFormat"
    format: Literal["tokenized"]
    input_ids: ColumnName = Field("input_ids", description="Column with the token ids.")
    labels: ColumnName = Field(
        "labels", description="Column with the ids of target tokens, and -100 elsewhere; may be absent."
    )
    mask: ColumnName = Field("loss_mask", description="Column with 1 for target tokens and 0 elsewhere; may be absent.")


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
    """Training and validation rows."""

    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    train: list[Source] = Field(min_length=1, description="Sources of training rows, concatenated or mixed by weight.")
    validation: list[Source] = Field([], description="Sources of validation rows.")
    validation_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Fraction of the training rows to split off for validation instead, sampled with the seed.",
    )
    validation_by: Literal["row", "prompt"] = Field(
        "row",
        description=(
            "Unit of the rows that validation_fraction splits off. row: single rows of all sources together. prompt: "
            "all rows with the same prompt (in a conversation, what comes before the first answer), in proportion from "
            "each source, so that no validation prompt is trained; rows without a prompt are split singly."
        ),
    )
    sample_seed: int | None = Field(
        None,
        ge=0,
        lt=2**32,
        description="Seed of samples of rows: `rows`, `weight`, `validation_fraction`, calibration. Null for "
        "training.seed.",
    )
    max_length: int = Field(2048, ge=8, description="Maximum row length in tokens.")
    overlength: Literal["error", "drop", "truncate_prompt", "truncate", "split"] = Field(
        "error",
        description=(
            "What to do with a longer row. error: stop. drop: drop the row. truncate_prompt: cut the start of its "
            "prompt, but not the system message and the tools. truncate: cut its end. split: make several rows of it, "
            "for text without a prompt only. Cut tokens and dropped rows are counted."
        ),
    )
    train_on: Literal["assistant", "last_turn", "completion", "all"] = Field(
        "assistant",
        description=(
            "Target tokens. assistant: every assistant turn. last_turn: the last assistant turn. completion: all "
            "assistant turns after the last user turn. all: all tokens. The end-of-turn token of a target turn is a "
            "target too."
        ),
    )
    split_turns: bool = Field(
        False,
        description=(
            "Make one row per assistant turn, with the turns before it as its prompt: "
            "for chat templates that render the last turn differently from earlier ones."
        ),
    )
    on_bad_row: Literal["error", "drop"] = Field(
        "error",
        description=(
            "What to do with a row that cannot be used: the chat template refuses it or omits a part of it, it has no "
            "target tokens or an empty answer, or it is malformed. error: stop. drop: drop the row and count it."
        ),
    )
    max_dropped: float = Field(
        0.01, ge=0, le=1, description="Maximum fraction of dropped rows, whatever the reason; beyond it, stop."
    )
    control_tokens: Literal["text", "error"] = Field(
        "text",
        description=(
            "Control tokens such as `<|im_end|>` written in the words of a conversation. text: they stay text. error: "
            "the row is bad, see `on_bad_row`."
        ),
    )
    template_arguments: dict[str, Any] = Field(
        {},
        description=(
            "Variables for the chat template, such as `enable_thinking: false`; saved with the run's template as "
            "defaults."
        ),
    )
    workers: Annotated[int | None, OnResume.MAY_CHANGE] = Field(
        None, ge=1, description="Processes that tokenize rows; by default one per core."
    )

    @property
    def sources(self) -> list[Source]:
        """The sources of training rows, then those of validation rows."""
        return [*self.train, *self.validation]

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _format_is_auto_by_default(cls, sources: Any) -> Any:
        """Fill in `format: auto`: a tagged union has no default tag."""
        if not isinstance(sources, list):
            return sources
        return [{"format": "auto", **source} if isinstance(source, dict) else source for source in sources]

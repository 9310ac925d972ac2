"""Auto: detects the format of a source from the columns of its first row."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from finetune.data.documents import Document, Format
from finetune.data.json_text import parsed_if_json, structured
from finetune.data.rows import Row, excerpt
from finetune.errors import BadRow, DataError
from finetune.recipe.sections.data import (
    AutoSource,
    ChatSource,
    ClassificationSource,
    CompletionSource,
    InstructionSource,
    MultipleChoiceSource,
    QaSource,
    ShareGptSource,
    SourceSection,
    TextSource,
    TokenizedSource,
)
from finetune.resolve import build

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
INSTRUCTION_AND_OUTPUT = (
    ("instruction", "response"),
    ("question", "response"),
    ("query", "response"),
    ("problem", "solution"),
    ("inputs", "targets"),
)
"""Other names of an instruction and its output in data sets."""
INPUT_COLUMNS = ("input", "context")
CHOICES_COLUMNS = ("choices", "options")
ANSWER_COLUMNS = ("answer", "answerKey", "answers", "label")
"""Columns with the right one of several choices."""

_ONE_CHOICE = re.compile(r"[a-h]|(?:choice|option|opt|op|distractor)[-_ ]?(?:[a-h]|\d)", re.IGNORECASE)
"""Names of columns with one of several choices."""

PROMPT_COLUMNS = ("prompt", "question", "instruction", "query", "input")


class AutoFormat(Format[AutoSource]):
    """Reads all rows in the format that it detects on the first one.

    Args:
        section: Section of the source; it sets no column names.
    """

    def __init__(self, section: AutoSource) -> None:
        super().__init__(section)
        self._detected: Format[Any] | None = None
        self._detected_on = ""  # place of the first row

    @property
    def resolved(self) -> SourceSection:
        """The section of the detected format, once a row has been read."""
        return self._detected.section if self._detected else self.section

    def document(self, row: Row) -> Document:
        """The document of the row, in the format detected on the first row."""
        detected = self._format(row)
        if isinstance(detected.section, QaSource) and (choices := _choices_column(row)) is not None:
            raise self._other_format(f"column {choices!r} has choices", row.where)
        try:
            return detected.document(row)
        except BadRow:
            raise
        except DataError as error:
            # A row with the columns of the format has some other error. Without them, the file mixes formats.
            if any(section == detected.section for section in _candidates(row)):
                raise
            raise self._other_format(error.what, error.where) from error

    def read_columns(self, row: Row) -> set[str]:
        """See the base class."""
        return self._format(row).read_columns(row)

    def _format(self, row: Row) -> Format[Any]:
        """The detected format; `row` is the first row where none is detected yet."""
        if self._detected is None:
            self._detected = build(detect(row))
            self._detected_on = row.where
        return self._detected

    def _other_format(self, what: str, where: str | None) -> DataError:
        name = self.resolved.model_dump()["format"]
        return DataError(
            f"the row does not have the format {name} that was detected on {self._detected_on}: {what}",
            where=where,
            hint="correct the row, or set the source's format and name its columns",
        )


def detect(row: Row) -> SourceSection:
    """The section of the format that the columns of a row match.

    Raises:
        DataError: They match no format, or more than one; or turns are text that is no JSON.
    """
    if {"chosen", "rejected"} <= row.values.keys():
        raise DataError(
            "the row has a chosen and a rejected answer; ft trains on one of them",
            where=row.where,
            hint=f"set the source's format and columns, for the chosen one {_of_chosen(row)}",
        )
    if separate := _separate_choices(row):
        raise DataError(
            f"the choices are in columns of their own: {excerpt(', '.join(separate))}",
            where=row.where,
            hint='write them into one column, {"question": "...", "choices": ["...", "..."], "answer": 0}, for format '
            "multiple_choice; with {format: qa, answers: <column>} the choices are not read",
        )
    found = _candidates(row)
    formats = [section.model_dump()["format"] for section in found]
    if not found:
        for column in CONVERSATION_COLUMNS:
            structured(row, column)
        raise DataError(
            f"the columns match no format: {excerpt(', '.join(row.values)) or '(none)'}",
            where=row.where,
            hint="set the source's format and name its columns, such as {format: completion, prompt: <column>, "
            "completion: <column>} (ft init: --format and --column); ft explain data.train lists the formats",
        )
    if len(found) > 1:
        raise DataError(
            f"the columns match more than one format: {', '.join(formats)}",
            where=row.where,
            hint=f"set the source's format: {' or '.join(formats)}",
        )
    return found[0]


def with_fitting_format(error: DataError, row: Row, source: SourceSection) -> DataError:
    """The error about a row that a format does not read, with the section of one that does in its hint."""
    if isinstance(error, BadRow) or isinstance(source, AutoSource):
        return error
    if (section := _fitting_section(row, source)) is None:
        return error
    return DataError(error.what, where=error.where, hint=f"set {section} for the source")


def _fitting_section(row: Row, section: SourceSection) -> str | None:
    """The section of another format that reads a row, in the notation of recipes.

    Args:
        row: A row that the section's format does not read.
        section: The section of its source.

    Returns:
        None where no format is found, or the row has the columns of the section and holds no conversation.
    """
    try:
        found = detect(row)
        build(found).document(row)
    except DataError:
        return None
    is_conversation = isinstance(found, ChatSource | ShareGptSource)
    columns = {getattr(section, key) for key in section.column_keys()}
    if type(found) is AutoSource or not (is_conversation or columns.isdisjoint(row.values)):
        return None
    return in_recipe(found)


def in_recipe(section: SourceSection) -> str:
    """A section in the notation of recipes, without defaults."""
    keys = {"format": section.model_dump()["format"], **section.model_dump(exclude_defaults=True)}
    return f"{{{', '.join(f'{key}: {value}' for key, value in keys.items())}}}"


def _candidates(row: Row) -> list[SourceSection]:
    """Every format that the columns match by its own column names, or else by other common names."""
    return list(_by_own_names(row)) or list(_by_other_names(row))


def _by_own_names(row: Row) -> Iterator[SourceSection]:
    has = row.values.keys()
    yield from _conversations(row)
    if {"instruction", "output"} <= has:
        yield InstructionSource(format="instruction")
    if {"prompt", "completion"} <= has:
        yield from _prompts(row)
    yield from _questions(row)
    if {"text", "label"} <= has:
        yield ClassificationSource(format="classification")
    elif "text" in has:
        yield TextSource(format="text")
    if "input_ids" in has:
        yield TokenizedSource(format="tokenized")


def _by_other_names(row: Row) -> Iterator[SourceSection]:
    has = row.values.keys()
    for instruction, output in INSTRUCTION_AND_OUTPUT:
        if {instruction, output} <= has:
            given = next((column for column in INPUT_COLUMNS if column in has), INPUT_COLUMNS[0])
            yield InstructionSource(format="instruction", instruction=instruction, output=output, input=given)
            return


def _questions(row: Row) -> Iterator[SourceSection]:
    """Multiple choice where the row has choices, whose answer means nothing without them; else question and answer."""
    has = row.values.keys()
    if (choices := _choices_column(row)) is not None:
        answer = next((column for column in ANSWER_COLUMNS if {"question", column} <= has), None)
        if answer:
            yield MultipleChoiceSource(format="multiple_choice", choices=choices, answer=answer)
        return
    for answers in ("answers", "answer"):
        if {"question", answers} <= has:
            yield QaSource(format="qa", answers=answers)
            return


def _choices_column(row: Row) -> str | None:
    """The column that holds choices, if there is one."""
    named = (column for column in row.values if column.lower() in CHOICES_COLUMNS)
    return next((column for column in named if row.values[column] not in (None, "", [], {})), None)


def _separate_choices(row: Row) -> list[str]:
    """Columns that hold a choice each, beside a question and its answer."""
    has = row.values.keys()
    if "question" not in has or has.isdisjoint(ANSWER_COLUMNS) or _choices_column(row) is not None:
        return []
    columns = [column for column in has if _ONE_CHOICE.fullmatch(column)]
    return columns if len(columns) > 1 else []


def _conversations(row: Row) -> Iterator[SourceSection]:
    for column in CONVERSATION_COLUMNS:
        yield from _turns(row, column)


def _prompts(row: Row) -> Iterator[SourceSection]:
    """A prompt and its completion, each a text or a list of turns."""
    as_turns = [section.model_copy(update={"answer": "completion"}) for section in _turns(row, "prompt")]
    yield from as_turns or [CompletionSource(format="completion")]


def _turns(row: Row, column: str) -> Iterator[SourceSection]:
    turns = parsed_if_json(row.values.get(column))
    first = turns[0] if isinstance(turns, list) and turns else None
    if isinstance(first, dict) and "role" in first:
        yield ChatSource(format="chat", messages=column)
    elif isinstance(first, dict) and "from" in first:
        yield ShareGptSource(format="sharegpt", conversations=column)


def conversation_section(row: Row) -> SourceSection | None:
    """The section of the row's conversation, whose last turn may be a question; None where it has none."""
    found = (section for column in (*CONVERSATION_COLUMNS, "prompt") for section in _turns(row, column))
    return next(found, None)


def _of_chosen(row: Row) -> str:
    """The recipe section that trains on the chosen answer of a preference row."""
    before = conversation_section(row)
    if before:
        keys = before.model_copy(update={"answer": "chosen"}).model_dump(exclude_defaults=True)
    elif conversation := list(_turns(row, "chosen")):
        keys = conversation[0].model_dump(exclude_defaults=True)
    elif prompt := next((column for column in PROMPT_COLUMNS if column in row.values), None):
        keys = {"format": "completion", "prompt": prompt, "completion": "chosen", "chat_template": "true"}
    else:
        keys = {"format": "text", "text": "chosen"}
    return f"{{{', '.join(f'{key}: {value}' for key, value in keys.items())}}}"

"""The tasks of `ft eval`: answers, choices and losses, on the validation rows of a recipe or on rows of a task."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Generic, TypeVar

from finetune.data.bad_rows import EMPTY
from finetune.data.dataset import LocatedDocument, TokenizedDataset
from finetune.data.documents import Conversation, ToolObject
from finetune.data.encode import Encoder, Example, Prompt, TrainOn
from finetune.data.formats.auto import with_fitting_format
from finetune.data.tokenized_source import numbered_rows
from finetune.errors import BadRow, DataError
from finetune.evaluation.calls.scores import CALL_METRICS, call_columns, call_scores, calls_of
from finetune.evaluation.classes import MACRO_F1, classes_of_answers
from finetune.evaluation.engine import Engine, OnProgress
from finetune.evaluation.generation import Sampling
from finetune.evaluation.measurement import Column, Measurement
from finetune.evaluation.metrics import LOSS, PERPLEXITY, answer_metrics, prediction
from finetune.recipe.sections.evaluation import (
    VALIDATION,
    Answers,
    Evaluation,
    GenerateTask,
    LossTask,
    RowsTask,
    TaskSection,
)
from finetune.resolve import build
from finetune.run.events import EventHandler, Progress

logger = logging.getLogger(__name__)

SEED = 0
"""Seed of the sample of `rows` of a source: the same rows for every model."""

S = TypeVar("S", bound=TaskSection)
R = TypeVar("R", bound=RowsTask)


class Task(ABC):
    """A task.

    Attributes:
        name: Its name in results and gates.
        metrics: Names of its metrics; None where they are known after the measurement only. Those of calls are
            measured only where rows have tools, and macro-F1 only where they have labels.
        has_loss: Whether it measures a loss per token. Models with different tokenizers cannot be compared by it.
    """

    name: str
    metrics: Sequence[str] | None
    has_loss = False

    @abstractmethod
    def measure(self, engine: Engine, limit: int | None, on_event: EventHandler) -> Measurement:
        """Measure a model.

        Args:
            engine: The model.
            limit: Take the first so many rows; None for all.
            on_event: Receives the progress.

        Raises:
            DataError: A row cannot be used.
        """

    def on_progress(self, engine: Engine, doing: str, on_event: EventHandler) -> OnProgress:
        """A handler that reports the progress of this task."""
        return lambda done, total: on_event(Progress(f"{engine.label}: {self.name}, {doing}", done, total))


@dataclass(frozen=True)
class _PromptRow:
    """A prompt, and the location of its row.

    Attributes:
        row: The location.
        prompt: The prompt.
        calls: The tool calls of the answer.
        has_tools: Whether the row offers tools, or its answer calls one.
        has_earlier_calls: Whether an answer before the last one calls a tool.
        has_label: Whether the answer is declared as a label.
        choices: The answers that the row offers.
    """

    row: str
    prompt: Prompt
    calls: Sequence[ToolObject] = ()
    has_tools: bool = False
    has_earlier_calls: bool = False
    has_label: bool = False
    choices: Sequence[str] = ()

    @classmethod
    def of(cls, located: LocatedDocument, prompt: Prompt) -> _PromptRow:
        """From a row and its prompt."""
        document = located.document
        if not isinstance(document, Conversation):
            return cls(located.where, prompt)
        *earlier, calls = [document.messages[turn].tool_calls for turn in document.answers]
        has_tools = bool(calls or document.tools)
        return cls(located.where, prompt, calls, has_tools, any(earlier), document.has_label, document.choices)


def validation_metrics(section: Evaluation) -> list[str]:
    """Names of the metrics of validation rows."""
    return [LOSS.name, PERPLEXITY.name, *(_names_of_metrics(section) if section.generation_rows else [])]


def _names_of_metrics(section: Answers) -> list[str]:
    return [*(metric.name for metric in answer_metrics(section)), MACRO_F1.name, *CALL_METRICS]


class ValidationTask(Task):
    """The validation rows of a recipe: their loss, and answers to the first of them.

    Args:
        split: The rows as training used them.
        section: The recipe's section.
        train_on: As in the recipe.
    """

    name = VALIDATION
    has_loss = True

    def __init__(self, split: TokenizedDataset, section: Evaluation, train_on: TrainOn) -> None:
        self.split = split
        self.section = section
        self.train_on = train_on
        self.metrics = validation_metrics(section)

    def measure(self, engine: Engine, limit: int | None, on_event: EventHandler) -> Measurement:
        """See the base class."""
        split = self.split[: self.section.max_rows][:limit]  # as training measures it
        places = [split.place(row) for row in range(len(split))]
        columns = _losses(places, list(split), engine, self.on_progress(engine, "loss", on_event))
        encoder = Encoder(engine.tokenizer, self.train_on)
        asked = _prompts_by_row(self.split.documents(), encoder, self.section)
        first = islice(asked, self.section.generation_rows)
        prompts = self._cut(list(chain.from_iterable(islice(first, limit))), engine)
        answers = _answers(prompts, self.section, engine, self.on_progress(engine, "answers", on_event))
        return replace(answers, columns=(*columns, *answers.columns))

    def _cut(self, prompts: list[_PromptRow], engine: Engine) -> list[_PromptRow]:
        """The prompts, cut at the beginning where no room for an answer is left: training truncated these rows too."""
        room = _room(self.section, engine)
        if room is None or room < 1 or all(len(each.prompt.ids) <= room for each in prompts):
            return prompts
        cut = sum(len(each.prompt.ids) > room for each in prompts)
        logger.warning("the beginning of %d of %d prompts is cut, to leave room for an answer", cut, len(prompts))
        return [replace(each, prompt=replace(each.prompt, ids=each.prompt.ids[-room:])) for each in prompts]


class OnRows(Task, Generic[R]):
    """A task on rows of a source, or on the validation rows of a recipe.

    Args:
        section: Its section.
        validation: The validation rows, for a section without a source.
    """

    def __init__(self, section: R, validation: TokenizedDataset | None = None) -> None:
        self.section = section
        self.name = section.name
        self._validation = validation

    def documents(self, limit: int | None) -> Iterator[LocatedDocument]:
        """The first rows of the source; all without a limit.

        Raises:
            DataError: A row cannot be used.
        """
        source = self.section.data
        if source is None:
            assert self._validation is not None, "rules ask for validation rows"
            yield from islice(self._validation.documents(), limit)
            return
        to_document = build(source).document
        for _, row in islice(numbered_rows(source, SEED), limit):
            try:
                yield LocatedDocument(to_document(row), row.where)
            except DataError as error:
                raise with_fitting_format(error, row, source) from error

    def none_found(self) -> DataError:
        """The error of a source without rows to measure."""
        return DataError(
            f"the task {self.name} has no rows to measure",
            where=self.section.data.place if self.section.data else VALIDATION,
            hint="write rows with an answer: a last message of the assistant, an output or a completion",
        )


class Generate(OnRows[GenerateTask]):
    """Answers to the rows' prompts."""

    def __init__(self, section: GenerateTask, validation: TokenizedDataset | None = None) -> None:
        super().__init__(section, validation)
        self.metrics = _names_of_metrics(section)

    def measure(self, engine: Engine, limit: int | None, on_event: EventHandler) -> Measurement:
        """See the base class."""
        documents = map(_with_reference, self.documents(limit))
        encoder = Encoder(engine.tokenizer, "last_turn")
        prompts = list(chain.from_iterable(_prompts_by_row(documents, encoder, self.section)))
        if not prompts:
            raise self.none_found()
        return _answers(prompts, self.section, engine, self.on_progress(engine, "answers", on_event))


class Loss(OnRows[LossTask]):
    """The loss of the rows' target tokens."""

    metrics = (LOSS.name, PERPLEXITY.name)
    has_loss = True

    def measure(self, engine: Engine, limit: int | None, on_event: EventHandler) -> Measurement:
        """See the base class."""
        encoder = Encoder(engine.tokenizer, "assistant")
        encoded = [
            (each.where, example)
            for each in self.documents(limit)
            for example in encoder.examples(each.document, each.where)
        ]
        found = [(row, example) for row, example in encoded if example.targets]  # others have no loss
        if not found:
            raise self.none_found()
        rows, examples = zip(*found, strict=True)
        return Measurement(_losses(rows, examples, engine, self.on_progress(engine, "loss", on_event)), (), {})


def _with_reference(each: LocatedDocument) -> LocatedDocument:
    """The row, whose reference answer is not empty.

    Raises:
        BadRow: It is empty, so that no answer compares with it.
    """
    document = each.document
    if isinstance(document, Conversation) and document.answers and not document.references:
        answer = document.messages[document.answers[-1]]
        if not (answer.content.strip() or answer.tool_calls):
            raise BadRow("the reference answer is empty", reason=EMPTY, where=each.where, hint="give it a text")
    return each


def _prompts_by_row(
    documents: Iterable[LocatedDocument], encoder: Encoder, section: Answers
) -> Iterator[list[_PromptRow]]:
    """The prompts of each row that has one: of its last answer, or of all."""
    for each in documents:
        parts = _parts(each) if section.turns == "all" else [each]
        asked = [(part, prompt) for part in parts if (prompt := encoder.prompt(part.document, part.where)) is not None]
        if asked:
            yield [_PromptRow.of(part, prompt) for part, prompt in asked]


def _warn_of_earlier_calls(prompts: Sequence[_PromptRow], section: Answers) -> None:
    earlier = [each.row for each in prompts if each.has_earlier_calls] if section.turns == "last" else []
    if earlier:
        logger.warning(
            "rows with tool calls before the last answer, which are not scored: %d (first: %s); `turns: all` in the "
            "section with the metrics scores every answer",
            len(earlier),
            earlier[0],
        )


def _parts(each: LocatedDocument) -> list[LocatedDocument]:
    """A conversation up to each of its answers; any other document as it is."""
    if not isinstance(each.document, Conversation):
        return [each]
    parts = each.document.split_turns()
    return [LocatedDocument(part, f"{each.where} turn {len(part.messages) - 1}") for part in parts]


def check_rows(lengths: Sequence[int], places: Sequence[str], engine: Engine) -> None:
    """Compare rows with the positions of the model.

    Raises:
        DataError: A row is longer than the model's table of positions.
    """
    engine.limit.check_rows(lengths, places.__getitem__, f"rows of {engine.label}", "shorten or drop longer rows")


def _losses(
    rows: Sequence[str], examples: Sequence[Example], engine: Engine, on_progress: OnProgress
) -> tuple[Column, ...]:
    check_rows([len(example.ids) for example in examples], rows, engine)
    found = engine.likelihoods(examples, on_progress)
    counts = [(-each.log_prob, each.tokens) for each in found]
    return tuple(Column.of(metric, rows, counts) for metric in (LOSS, PERPLEXITY))


def _answers(prompts: Sequence[_PromptRow], section: Answers, engine: Engine, on_progress: OnProgress) -> Measurement:
    if not prompts:
        return Measurement((), (), {})
    lengths = [len(each.prompt.ids) for each in prompts]
    engine.limit.check_room(lengths, lambda row: prompts[row].row, section.max_new_tokens, "max_new_tokens")
    sampling = Sampling(section.max_new_tokens)
    answers = engine.answers([each.prompt.ids for each in prompts], sampling, on_progress)
    references = [[engine.decoder.reference(one) for one in each.prompt.references] for each in prompts]
    texts = [
        Column.of(
            metric,
            [each.row for each in prompts],
            [
                # References of reasoning models contain their reasoning too.
                metric.count(prediction(answer), [prediction(reference) for reference in accepted])
                for accepted, answer in zip(references, answers, strict=True)
            ],
        )
        for metric in answer_metrics(section)
    ]
    classes = classes_of_answers(prompts, references, answers, section)
    _warn_of_earlier_calls(prompts, section)
    calls = calls_of(prompts, references, answers, section, Encoder(engine.tokenizer, "last_turn"), engine.decoder)
    records: tuple[dict[str, Any], ...] = tuple(
        {
            "row": each.row,
            "prompt": engine.tokenizer.decode(each.prompt.ids),
            "references": accepted,
            "answer": answer,
            **({"calls": calls[index].record} if calls else {}),
            "scores": {column.metric.name: column.row_score(index) for column in texts}
            | (call_scores(calls[index], section) if calls else {}),
        }
        for index, (each, accepted, answer) in enumerate(zip(prompts, references, answers, strict=True))
    )
    of_classes = [classes.column] if classes else []
    return Measurement((*texts, *of_classes, *call_columns(calls or (), section)), records, {}, classes)


def _room(section: Answers, engine: Engine) -> int | None:
    """The most tokens of a prompt that leave room for the longest answer; None where positions are computed."""
    limit = engine.limit
    return limit.count - section.max_new_tokens if limit.is_table and limit.count is not None else None

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
from finetune.data.documents import Conversation, PlainText, ToolObject
from finetune.data.encode import Encoder, Example, Prompt, TrainOn
from finetune.data.formats.auto import with_fitting_format
from finetune.data.tokenized_source import numbered_rows
from finetune.errors import BadRow, DataError
from finetune.evaluation.calls.scores import CALL_METRICS, call_columns, call_scores, calls_of
from finetune.evaluation.engine import Engine, OnProgress
from finetune.evaluation.generation import Sampling
from finetune.evaluation.measurement import Column, Measurement
from finetune.evaluation.metrics import LOSS, PERPLEXITY, Metric, answer_metrics, mean, prediction
from finetune.recipe.sections.evaluation import (
    VALIDATION,
    Answers,
    ChooseTask,
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

ACCURACY = Metric("accuracy", mean, is_binary=True)
ACCURACY_BY_LENGTH = Metric("accuracy_norm", mean, is_binary=True)

S = TypeVar("S", bound=TaskSection)
R = TypeVar("R", bound=RowsTask)


class Task(ABC):
    """A task.

    Attributes:
        name: Its name in results and gates.
        metrics: Names of its metrics; None where they are known after the measurement only. Those of calls are
            measured only where rows have tools.
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

    def _on_progress(self, engine: Engine, doing: str, on_event: EventHandler) -> OnProgress:
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
    """

    row: str
    prompt: Prompt
    calls: Sequence[ToolObject] = ()
    has_tools: bool = False
    has_earlier_calls: bool = False

    @classmethod
    def of(cls, located: LocatedDocument, prompt: Prompt) -> _PromptRow:
        """From a row and its prompt."""
        document = located.document
        if not isinstance(document, Conversation):
            return cls(located.where, prompt)
        *earlier, calls = [document.messages[turn].tool_calls for turn in document.answers]
        return cls(located.where, prompt, calls, bool(calls or document.tools), any(earlier))


def validation_metrics(section: Evaluation) -> list[str]:
    """Names of the metrics of validation rows."""
    of_answers = (
        [*(metric.name for metric in answer_metrics(section)), *CALL_METRICS] if section.generation_rows else []
    )
    return [LOSS.name, PERPLEXITY.name, *of_answers]


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
        columns = _losses(places, list(split), engine, self._on_progress(engine, "loss", on_event))
        encoder = Encoder(engine.tokenizer, self.train_on)
        asked = _prompts_by_row(self.split.documents(), encoder, self.section)
        first = islice(asked, self.section.generation_rows)
        prompts = self._cut(list(chain.from_iterable(islice(first, limit))), engine)
        answers = _answers(prompts, self.section, engine, self._on_progress(engine, "answers", on_event))
        return Measurement((*columns, *answers.columns), answers.records, {})

    def _cut(self, prompts: list[_PromptRow], engine: Engine) -> list[_PromptRow]:
        """The prompts, cut at the beginning where no room for an answer is left: training truncated these rows too."""
        room = _room(self.section, engine)
        if room is None or room < 1 or all(len(each.prompt.ids) <= room for each in prompts):
            return prompts
        cut = sum(len(each.prompt.ids) > room for each in prompts)
        logger.warning("the beginning of %d of %d prompts is cut, to leave room for an answer", cut, len(prompts))
        return [replace(each, prompt=replace(each.prompt, ids=each.prompt.ids[-room:])) for each in prompts]


class _OnRows(Task, Generic[R]):
    """A task on rows of a source, or on the validation rows of a recipe.

    Args:
        section: Its section.
        validation: The validation rows, for a section without a source.
    """

    def __init__(self, section: R, validation: TokenizedDataset | None = None) -> None:
        self.section = section
        self.name = section.name
        self._validation = validation

    def _documents(self, limit: int | None) -> Iterator[LocatedDocument]:
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

    def _none_found(self) -> DataError:
        return DataError(
            f"the task {self.name} has no rows to measure",
            where=self.section.data.place if self.section.data else VALIDATION,
            hint="write rows with an answer: a last message of the assistant, an output or a completion",
        )


class Generate(_OnRows[GenerateTask]):
    """Answers to the rows' prompts."""

    def __init__(self, section: GenerateTask, validation: TokenizedDataset | None = None) -> None:
        super().__init__(section, validation)
        self.metrics = [*(metric.name for metric in answer_metrics(section)), *CALL_METRICS]

    def measure(self, engine: Engine, limit: int | None, on_event: EventHandler) -> Measurement:
        """See the base class."""
        documents = map(_with_reference, self._documents(limit))
        encoder = Encoder(engine.tokenizer, "last_turn")
        prompts = list(chain.from_iterable(_prompts_by_row(documents, encoder, self.section)))
        if not prompts:
            raise self._none_found()
        return _answers(prompts, self.section, engine, self._on_progress(engine, "answers", on_event))


class Choose(_OnRows[ChooseTask]):
    """Multiple choice: the answer of the highest likelihood, also normalized by length in characters.

    The two scores are `acc` and `acc_norm` of lm-evaluation-harness.
    """

    metrics = (ACCURACY.name, ACCURACY_BY_LENGTH.name)

    def measure(self, engine: Engine, limit: int | None, on_event: EventHandler) -> Measurement:
        """See the base class."""
        encoder = Encoder(engine.tokenizer, "last_turn")
        questions = [(each, self._choices(each)) for each in _with_choices(self._documents(limit))]
        if not questions:
            raise self._none_found()
        examples = [
            _without_end(encoder.examples(each.answered(choice), each.where)[0], engine)
            for each, choices in questions
            for choice in choices
        ]
        places = [each.where for each, choices in questions for _ in choices]
        _check_rows([len(example.ids) for example in examples], places, engine)
        found = iter(engine.likelihoods(examples, self._on_progress(engine, "choices", on_event)))
        rows, scores, records = [], [], []
        for each, choices in questions:
            log_probs = {choice: next(found).log_prob for choice in choices}
            by_length = {choice: log_prob / max(1, len(choice)) for choice, log_prob in log_probs.items()}
            chosen = max(log_probs, key=log_probs.__getitem__)
            right = each.references
            rows.append(each.where)
            # A longer answer has a lower likelihood: the normalized score divides by the length.
            scores.append((float(chosen in right), float(max(by_length, key=by_length.__getitem__) in right)))
            records.append(
                {
                    "row": each.where,
                    "prompt": engine.tokenizer.decode(_prompt(encoder, each).ids),
                    "references": list(right),
                    "choices": log_probs,
                    "answer": chosen,
                    "scores": dict(zip(self.metrics, scores[-1], strict=True)),
                }
            )
        columns = tuple(
            Column.of(metric, rows, [(score[index], 1.0) for score in scores])
            for index, metric in enumerate((ACCURACY, ACCURACY_BY_LENGTH))
        )
        return Measurement(columns, tuple(records), {})

    def _choices(self, each: _WithChoices) -> Sequence[str]:
        choices = tuple(dict.fromkeys(self.section.choices)) or each.choices
        right = each.references
        if not choices:
            raise DataError(
                "the row offers no choices",
                where=each.where,
                hint=f"name them in the task {self.name}: choices: [...], or use data of format multiple_choice",
            )
        if not set(choices) & set(right):
            raise DataError(
                f"the row's answer {right[0]!r} is none of the choices: {', '.join(choices)}",
                where=each.where,
                hint=f"correct the row, or the choices of the task {self.name}",
            )
        return choices


class Loss(_OnRows[LossTask]):
    """The loss of the rows' target tokens."""

    metrics = (LOSS.name, PERPLEXITY.name)
    has_loss = True

    def measure(self, engine: Engine, limit: int | None, on_event: EventHandler) -> Measurement:
        """See the base class."""
        encoder = Encoder(engine.tokenizer, "assistant")
        encoded = [
            (each.where, example)
            for each in self._documents(limit)
            for example in encoder.examples(each.document, each.where)
        ]
        found = [(row, example) for row, example in encoded if example.targets]  # others have no loss
        if not found:
            raise self._none_found()
        rows, examples = zip(*found, strict=True)
        return Measurement(_losses(rows, examples, engine, self._on_progress(engine, "loss", on_event)), (), {})


@dataclass(frozen=True)
class _WithChoices:
    """A question with one of several answers, as turns or as plain text, and the location of its row."""

    document: Conversation | PlainText
    where: str

    @property
    def choices(self) -> tuple[str, ...]:
        """The choices that the row offers itself."""
        return () if isinstance(self.document, PlainText) else self.document.choices

    @property
    def references(self) -> tuple[str, ...]:
        """The answers that count as right."""
        if isinstance(self.document, PlainText):
            return (self.document.completion.strip(),)
        return self.document.references or (self.document.messages[-1].content,)

    def answered(self, choice: str) -> Conversation | PlainText:
        """The question with another answer; in plain text with the row's own space before it."""
        if isinstance(self.document, PlainText):
            answer = self.document.completion
            return replace(self.document, completion=answer[: len(answer) - len(answer.lstrip())] + choice)
        *earlier, last = self.document.messages
        return replace(self.document, messages=(*earlier, replace(last, content=choice, train=True, reasoning="")))


def _with_choices(documents: Iterable[LocatedDocument]) -> Iterator[_WithChoices]:
    for each in documents:
        match each.document:
            case Conversation() as document if document.messages[-1].role == "assistant":
                yield _WithChoices(document, each.where)
            case PlainText() as document if document.prompt:
                yield _WithChoices(document, each.where)
            case _:
                raise DataError(
                    "the row is not a question with an answer to choose",
                    where=each.where,
                    hint="use data of format multiple_choice, classification, qa, instruction or completion",
                )


def _without_end(example: Example, engine: Engine) -> Example:
    """The row up to the last token of its text.

    The end-of-turn tokens are the same for all choices; their probability is not part of the choice.
    """
    special = set(engine.tokenizer.all_special_ids)
    text = [
        index for index, is_target in enumerate(example.is_target) if is_target and example.ids[index] not in special
    ]
    end = text[-1] + 1 if text else len(example.ids)
    return Example(example.ids[:end], example.is_target[:end])


def _prompt(encoder: Encoder, each: _WithChoices) -> Prompt:
    prompt = encoder.prompt(each.document, each.where)
    assert prompt is not None, "it has an answer"
    return prompt


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


def _check_rows(lengths: Sequence[int], places: Sequence[str], engine: Engine) -> None:
    """Compare rows with the positions of the model.

    Raises:
        DataError: A row is longer than the model's table of positions.
    """
    engine.limit.check_rows(lengths, places.__getitem__, f"rows of {engine.label}", "shorten or drop longer rows")


def _losses(
    rows: Sequence[str], examples: Sequence[Example], engine: Engine, on_progress: OnProgress
) -> tuple[Column, ...]:
    _check_rows([len(example.ids) for example in examples], rows, engine)
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
    return Measurement((*texts, *call_columns(calls or (), section)), records, {})


def _room(section: Answers, engine: Engine) -> int | None:
    """The most tokens of a prompt that leave room for the longest answer; None where positions are computed."""
    limit = engine.limit
    return limit.count - section.max_new_tokens if limit.is_table and limit.count is not None else None

"""What `ft eval` measures: answers, choices and losses, on rows that are held out or rows of a task of their own."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Generic, TypeVar

from finetune.data.dataset import LocatedDocument, TokenizedDataset
from finetune.data.documents import Conversation
from finetune.data.encode import Encoder, Example, Prompt, TrainOn
from finetune.data.tokenized_source import numbered_rows
from finetune.errors import DataError
from finetune.evaluation.engine import Engine, Tell
from finetune.evaluation.generation import Sampling
from finetune.evaluation.measurement import Column, Measurement
from finetune.evaluation.metrics import LOSS, PERPLEXITY, Metric, answer_metrics, mean, prediction
from finetune.recipe.sections.evaluation import (
    HELD_OUT,
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
"""Of the draw of a source's `rows`: the same rows for every model."""

ACCURACY = Metric("accuracy", mean, is_binary=True)
ACCURACY_BY_LENGTH = Metric("accuracy_norm", mean, is_binary=True)

S = TypeVar("S", bound=TaskSection)
R = TypeVar("R", bound=RowsTask)


class Task(ABC):
    """Something to measure.

    Attributes:
        name: What it is called in results and gates.
        metrics: Names of its metrics; None where only its results tell.
        has_loss: Whether it measures a loss per token, which models with other tokens cannot be compared by.
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
            on_event: Told how far it is.

        Raises:
            DataError: A row cannot be used.
        """

    def _tell(self, engine: Engine, doing: str, on_event: EventHandler) -> Tell:
        return lambda done, total: on_event(Progress(f"{engine.label}: {self.name}, {doing}", done, total))


@dataclass(frozen=True)
class _Asked:
    """A prompt, and the place of its row."""

    row: str
    prompt: Prompt


class HeldOut(Task):
    """The held-out rows of a recipe: their loss, and answers to the first of them.

    Args:
        split: The rows as the training had them.
        section: The recipe's section.
        train_on: As in the recipe.
    """

    name = HELD_OUT
    has_loss = True

    def __init__(self, split: TokenizedDataset, section: Evaluation, train_on: TrainOn) -> None:
        self.split = split
        self.section = section
        self.train_on = train_on
        of_answers = answer_metrics(section) if section.generation_rows else []
        self.metrics = [LOSS.name, PERPLEXITY.name, *(metric.name for metric in of_answers)]

    def measure(self, engine: Engine, limit: int | None, on_event: EventHandler) -> Measurement:
        """See the base class."""
        split = self.split[: self.section.max_rows][:limit]
        places = [split.place(row) for row in range(len(split))]
        columns = _losses(places, list(split), engine, self._tell(engine, "loss", on_event))
        encoder = Encoder(engine.tokenizer, self.train_on)
        whole = islice(_asked(self.split.documents(), encoder), self.section.generation_rows)
        asked = self._cut(list(islice(whole, limit)), engine)
        answers = _answers(asked, self.section, engine, self._tell(engine, "answers", on_event))
        return Measurement((*columns, *answers.columns), answers.records, {})

    def _cut(self, asked: list[_Asked], engine: Engine) -> list[_Asked]:
        """Prompts without what leaves no room for an answer at their beginning: rows that were cut in training too."""
        room = _room(self.section, engine)
        if room is None or room < 1 or all(len(each.prompt.ids) <= room for each in asked):
            return asked
        cut = sum(len(each.prompt.ids) > room for each in asked)
        logger.warning("the beginning of %d of %d prompts is cut: an answer must have room", cut, len(asked))
        return [_Asked(each.row, Prompt(each.prompt.ids[-room:], each.prompt.references)) for each in asked]


class _OnRows(Task, Generic[R]):
    """A task on rows of a source.

    Args:
        section: Its section.
    """

    def __init__(self, section: R) -> None:
        self.section = section
        self.name = section.name

    def _documents(self, limit: int | None) -> Iterator[LocatedDocument]:
        source = self.section.data
        to_document = build(source).document
        for _, row in islice(numbered_rows(source, SEED), limit):
            yield LocatedDocument(to_document(row), row.where)

    def _none_found(self) -> DataError:
        return DataError(
            f"the task {self.name} has no rows to measure", where=self.section.data.place, hint="check the file"
        )


class Generate(_OnRows[GenerateTask]):
    """Answers to the rows' prompts."""

    def __init__(self, section: GenerateTask) -> None:
        super().__init__(section)
        self.metrics = [metric.name for metric in answer_metrics(section)]

    def measure(self, engine: Engine, limit: int | None, on_event: EventHandler) -> Measurement:
        """See the base class."""
        asked = list(_asked(self._documents(limit), Encoder(engine.tokenizer, "last_turn")))
        if not asked:
            raise self._none_found()
        return _answers(asked, self.section, engine, self._tell(engine, "answers", on_event))


class Choose(_OnRows[ChooseTask]):
    """Which of some answers the model finds likeliest: as they are, and by their length in characters."""

    metrics = (ACCURACY.name, ACCURACY_BY_LENGTH.name)

    def measure(self, engine: Engine, limit: int | None, on_event: EventHandler) -> Measurement:
        """See the base class."""
        encoder = Encoder(engine.tokenizer, "last_turn")
        asked = [(each, self._choices(each)) for each in _with_choices(self._documents(limit))]
        if not asked:
            raise self._none_found()
        examples = [
            _without_end(encoder.example(_answered(each.document, choice), each.where), engine)
            for each, choices in asked
            for choice in choices
        ]
        found = iter(engine.likelihoods(examples, self._tell(engine, "choices", on_event)))
        rows, scores, records = [], [], []
        for each, choices in asked:
            probs = {choice: next(found).log_prob for choice in choices}
            by_length = {choice: chance / max(1, len(choice)) for choice, chance in probs.items()}
            chosen = max(probs, key=probs.__getitem__)
            right = _references(each.document)
            rows.append(each.where)
            scores.append((float(chosen in right), float(max(by_length, key=by_length.__getitem__) in right)))
            records.append(
                {
                    "row": each.where,
                    "prompt": engine.tokenizer.decode(_prompt(encoder, each).ids),
                    "references": list(right),
                    "choices": probs,
                    "answer": chosen,
                    "scores": dict(zip(self.metrics, scores[-1], strict=True)),
                }
            )
        columns = tuple(
            Column.of(metric, rows, [(score[place], 1.0) for score in scores])
            for place, metric in enumerate((ACCURACY, ACCURACY_BY_LENGTH))
        )
        return Measurement(columns, tuple(records), {})

    def _choices(self, each: _WithChoices) -> Sequence[str]:
        choices = tuple(dict.fromkeys(self.section.choices)) or each.document.choices
        right = _references(each.document)
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
    """The loss of the rows' trained tokens."""

    metrics = (LOSS.name, PERPLEXITY.name)
    has_loss = True

    def measure(self, engine: Engine, limit: int | None, on_event: EventHandler) -> Measurement:
        """See the base class."""
        encoder = Encoder(engine.tokenizer, "assistant")
        encoded = [(each.where, encoder.example(each.document, each.where)) for each in self._documents(limit)]
        found = [(row, example) for row, example in encoded if example.targets]
        if not found:
            raise self._none_found()
        rows, examples = zip(*found, strict=True)
        return Measurement(_losses(rows, examples, engine, self._tell(engine, "loss", on_event)), (), {})


@dataclass(frozen=True)
class _WithChoices:
    """A conversation whose last turn is one of several answers, and the place of its row."""

    document: Conversation
    where: str


def _with_choices(documents: Iterable[LocatedDocument]) -> Iterator[_WithChoices]:
    for each in documents:
        if not isinstance(each.document, Conversation) or each.document.messages[-1].role != "assistant":
            raise DataError(
                "the row is no question with an answer to choose",
                where=each.where,
                hint="use data of format multiple_choice, classification, qa or instruction",
            )
        yield _WithChoices(each.document, each.where)


def _answered(document: Conversation, answer: str) -> Conversation:
    """The same with another answer."""
    *asked, last = document.messages
    return replace(document, messages=(*asked, replace(last, content=answer, train=True, reasoning="")))


def _without_end(example: Example, engine: Engine) -> Example:
    """The row up to its last word: that an answer ends is no part of which answer it is."""
    special = set(engine.tokenizer.all_special_ids)
    words = [
        place for place, is_target in enumerate(example.is_target) if is_target and example.ids[place] not in special
    ]
    end = words[-1] + 1 if words else len(example.ids)
    return Example(example.ids[:end], example.is_target[:end])


def _prompt(encoder: Encoder, each: _WithChoices) -> Prompt:
    prompt = encoder.prompt(each.document, each.where)
    assert prompt is not None, "it has an answer"
    return prompt


def _references(document: Conversation) -> tuple[str, ...]:
    return document.references or (document.messages[-1].content,)


def _asked(documents: Iterable[LocatedDocument], encoder: Encoder) -> Iterator[_Asked]:
    """The rows that have a prompt."""
    for each in documents:
        if (prompt := encoder.prompt(each.document, each.where)) is not None:
            yield _Asked(each.where, prompt)


def _losses(rows: Sequence[str], examples: Sequence[Example], engine: Engine, tell: Tell) -> tuple[Column, ...]:
    found = engine.likelihoods(examples, tell)
    counts = [(-each.log_prob, each.tokens) for each in found]
    return tuple(Column.of(metric, rows, counts) for metric in (LOSS, PERPLEXITY))


def _answers(asked: Sequence[_Asked], section: Answers, engine: Engine, tell: Tell) -> Measurement:
    if not asked:
        return Measurement((), (), {})
    for each in asked:
        _refuse_lack_of_room(each, section, engine)
    sampling = Sampling(section.max_new_tokens)
    answers = engine.answers([each.prompt.ids for each in asked], sampling, tell)
    columns = tuple(
        Column.of(
            metric,
            [each.row for each in asked],
            [
                metric.count(prediction(answer), [prediction(reference) for reference in each.prompt.references])
                for each, answer in zip(asked, answers, strict=True)
            ],
        )
        for metric in answer_metrics(section)
    )
    records: tuple[dict[str, Any], ...] = tuple(
        {
            "row": each.row,
            "prompt": engine.tokenizer.decode(each.prompt.ids),
            "references": list(each.prompt.references),
            "answer": answer,
            "scores": {column.metric.name: column.row_score(number) for column in columns},
        }
        for number, (each, answer) in enumerate(zip(asked, answers, strict=True))
    )
    return Measurement(columns, records, {})


def _room(section: Answers, engine: Engine) -> int | None:
    """Tokens that a prompt may have before the longest answer; None where nothing says."""
    return None if engine.positions is None else engine.positions - section.max_new_tokens


def _refuse_lack_of_room(asked: _Asked, section: Answers, engine: Engine) -> None:
    most = _room(section, engine)
    if most is not None and len(asked.prompt.ids) > most:
        room = most + section.max_new_tokens - len(asked.prompt.ids)
        raise DataError(
            f"after its {len(asked.prompt.ids)} tokens there is room for {max(room, 0)} more in the "
            f"{engine.positions} positions of {engine.label}, not for {section.max_new_tokens}",
            where=asked.row,
            hint=f"set max_new_tokens to {room} or less" if room > 0 else "leave the row out",
        )

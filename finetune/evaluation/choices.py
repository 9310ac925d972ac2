"""The task `choose` of `ft eval`: the answer of the highest likelihood among given ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from finetune.data.dataset import LocatedDocument, TokenizedDataset
from finetune.data.documents import Conversation, PlainText
from finetune.data.encode import Encoder, Example
from finetune.data.rows import excerpt
from finetune.errors import DataError
from finetune.evaluation.classes import MACRO_F1, MOST_LABELS, Classes
from finetune.evaluation.engine import Engine
from finetune.evaluation.measurement import Column, Measurement
from finetune.evaluation.metrics import Metric, mean
from finetune.evaluation.tasks import OnRows, check_rows
from finetune.recipe.sections.data import ClassificationSource
from finetune.recipe.sections.evaluation import ChooseTask
from finetune.run.events import EventHandler

ACCURACY = Metric("accuracy", mean, is_binary=True)
ACCURACY_BY_LENGTH = Metric("accuracy_norm", mean, is_binary=True)


@dataclass(frozen=True)
class _Question:
    """A question with one of several answers, as turns or as plain text.

    Attributes:
        document: The question.
        where: The location of its row.
        choices: The answers to choose from.
    """

    document: Conversation | PlainText
    where: str
    choices: Sequence[str]

    @property
    def references(self) -> tuple[str, ...]:
        """The answers that count as right."""
        if isinstance(self.document, PlainText):
            return (self.document.completion.strip(),)
        return self.document.references or (self.document.messages[-1].content,)

    @property
    def has_label(self) -> bool:
        """Whether the answer is a label, which means the same in every row."""
        return isinstance(self.document, Conversation) and self.document.has_label

    def answered(self, choice: str) -> Conversation | PlainText:
        """The question with another answer; in plain text with the row's own space before it."""
        if isinstance(self.document, PlainText):
            answer = self.document.completion
            return replace(self.document, completion=answer[: len(answer) - len(answer.lstrip())] + choice)
        *earlier, last = self.document.messages
        return replace(self.document, messages=(*earlier, replace(last, content=choice, train=True, reasoning="")))

    def prompt(self, encoder: Encoder) -> str:
        """The text before the answer."""
        prompt = encoder.prompt(self.document, self.where)
        assert prompt is not None, "it has an answer"
        return encoder.tokenizer.decode(prompt.ids)


class Choose(OnRows[ChooseTask]):
    """Multiple choice: the answer of the highest likelihood, also normalized by length in characters.

    The two accuracies are `acc` and `acc_norm` of lm-evaluation-harness. Choices that are the same in every row are
    labels: macro-F1 and the confusion matrix compare the answer of the highest likelihood with the row's label.
    """

    def __init__(self, section: ChooseTask, validation: TokenizedDataset | None = None) -> None:
        super().__init__(section, validation)
        source = section.data
        # Of validation rows it is known after the measurement only.
        may_have_labels = section.choices or source is None or isinstance(source, ClassificationSource)
        self.metrics = [ACCURACY.name, ACCURACY_BY_LENGTH.name, *([MACRO_F1.name] if may_have_labels else [])]

    def measure(self, engine: Engine, limit: int | None, on_event: EventHandler) -> Measurement:
        """See the base class."""
        encoder = Encoder(engine.tokenizer, "last_turn")
        questions = [self._question(each) for each in self.documents(limit)]
        if not questions:
            raise self.none_found()
        examples = [example for each in questions for example in _examples(each, encoder, engine)]
        places = [each.where for each in questions for _ in each.choices]
        check_rows([len(example.ids) for example in examples], places, engine)
        found = iter(engine.likelihoods(examples, self.on_progress(engine, "choices", on_event)))
        records = [
            _record(each, {choice: next(found).log_prob for choice in each.choices}, encoder) for each in questions
        ]
        rows = [each.where for each in questions]
        columns = [
            Column.of(metric, rows, [(record["scores"][metric.name], 1.0) for record in records])
            for metric in (ACCURACY, ACCURACY_BY_LENGTH)
        ]
        classes = self._classes(questions, [record["answer"] for record in records])
        of_classes = [classes.column] if classes else []
        return Measurement((*columns, *of_classes), tuple(records), {}, classes)

    def _classes(self, questions: Sequence[_Question], answers: Sequence[str]) -> Classes | None:
        labels = list(dict.fromkeys(choice for each in questions for choice in each.choices))
        are_labels = bool(self.section.choices) or all(each.has_label for each in questions)
        if not are_labels or len(labels) > MOST_LABELS or any(len(set(each.references)) > 1 for each in questions):
            return None
        references = [each.references[0] for each in questions]
        return Classes.of(labels, [each.where for each in questions], references, answers)

    def _question(self, each: LocatedDocument) -> _Question:
        document = each.document
        is_answered = (
            document.messages[-1].role == "assistant"
            if isinstance(document, Conversation)
            else isinstance(document, PlainText) and bool(document.prompt)
        )
        if not is_answered or not isinstance(document, Conversation | PlainText):
            raise DataError(
                "the row is not a question with an answer to choose",
                where=each.where,
                hint="use data of format multiple_choice, classification, qa, instruction or completion",
            )
        own = document.choices if isinstance(document, Conversation) else ()
        question = _Question(document, each.where, tuple(dict.fromkeys(self.section.choices)) or own)
        self._check_choices(question)
        return question

    def _check_choices(self, question: _Question) -> None:
        right = question.references
        if not question.choices:
            raise DataError(
                "the row offers no choices",
                where=question.where,
                hint=f"name them in the task {self.name}: choices: [...], or use data of format multiple_choice",
            )
        if not set(question.choices) & set(right):
            raise DataError(
                f"the row's answer {right[0]!r} is none of the choices: {excerpt(', '.join(question.choices))}",
                where=question.where,
                hint=f"correct the row, or the choices of the task {self.name}",
            )


def _record(question: _Question, log_probs: Mapping[str, float], encoder: Encoder) -> dict[str, Any]:
    """The prediction for a row: its answer is the choice of the highest likelihood."""
    # A longer answer has a lower likelihood: the normalized score divides by the length.
    by_length = {choice: log_prob / max(1, len(choice)) for choice, log_prob in log_probs.items()}
    chosen, chosen_by_length = (max(each, key=each.__getitem__) for each in (log_probs, by_length))
    right = question.references
    return {
        "row": question.where,
        "prompt": question.prompt(encoder),
        "references": list(right),
        "choices": dict(log_probs),
        "answer": chosen,
        "scores": {
            ACCURACY.name: float(chosen in right),
            ACCURACY_BY_LENGTH.name: float(chosen_by_length in right),
        },
    }


def _examples(question: _Question, encoder: Encoder, engine: Engine) -> list[Example]:
    """The row with each choice, up to the last token of its text.

    The end of turn is the same for all choices; its probability is not part of the choice. It is where the tokens of a
    choice begin another one: without an end, `card` could never be less likely than `card arrival`.
    """
    whole = [encoder.examples(question.answered(choice), question.where)[0] for choice in question.choices]
    ends = [_end_of_text(example, engine) for example in whole]
    texts = sorted(example.ids[:end] for example, end in zip(whole, ends, strict=True))
    # Sorted, a text that begins others is followed by one of them.
    begins_another = any(after[: len(text)] == text for text, after in pairwise(texts))
    return [_cut(example, end + begins_another) for example, end in zip(whole, ends, strict=True)]


def _end_of_text(example: Example, engine: Engine) -> int:
    """Index of the first token after the text of the answer."""
    special = set(engine.tokenizer.all_special_ids)
    targets = [index for index, is_target in enumerate(example.is_target) if is_target]
    text = [index for index in targets if example.ids[index] not in special]
    return text[-1] + 1 if text else len(example.ids)


def _cut(example: Example, end: int) -> Example:
    return Example(example.ids[:end], example.is_target[:end])

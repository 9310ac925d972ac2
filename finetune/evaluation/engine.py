"""Predictions of one model: likelihoods and answers, computed in batches and cached by row.

Likelihoods are computed here, in one way for every model. Answers come from a `Generator`: our own generation
(`ModelGenerator`) or vLLM (`VllmGenerator`, imported on demand).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from finetune.data.encode import Example
from finetune.evaluation.generation import AnswerDecoder, Sampling, generate
from finetune.evaluation.likelihood import Likelihood, likelihoods
from finetune.evaluation.prediction_cache import PredictionCache, digest
from finetune.models.loading.positions import PositionLimit

OnProgress = Callable[[int, int], None]
"""Receives the number of rows that are done, and of all rows."""

OnAnswers = Callable[[dict[int, str]], None]
"""Receives finished answers by the indices of their prompts."""


class Generator(ABC):
    """A generation backend.

    Attributes:
        name: Its name in results, with a version if it is another program. Part of the key of cached answers.
    """

    name: str

    @abstractmethod
    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_answers: OnAnswers) -> None:
        """Continue each prompt until an end token of tokenizer or model, a stop of `sampling`, or `max_new_tokens`.

        Args:
            prompts: Token ids, at least one prompt.
            sampling: Selection of tokens.
            on_answers: Receives answers as soon as they are complete, and an empty dict when the model is loaded.

        Raises:
            OutOfMemoryError: A row by itself does not fit.
        """

    def close(self) -> None:
        """Free the model. The generator stays usable: the next call loads the model again."""
        return None


@dataclass(frozen=True)
class ModelGenerator(Generator):
    """Our own generation, with the model that computes likelihoods.

    Attributes:
        load: Loads the model at the first call, and returns it.
        tokenizer: Its tokenizer.
        batch_size: Most rows of one forward pass; fewer where memory is short.
        padding: Any token id.
        answer_ends: Ids that end an answer, beside those of tokenizer and model.
    """

    load: Callable[[], nn.Module]
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    padding: int
    answer_ends: Sequence[int] = ()
    name = "ft"

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_answers: OnAnswers) -> None:
        """See the base class."""
        model = self.load()
        on_answers({})
        generate(
            model,
            self.tokenizer,
            prompts,
            sampling,
            batch_size=self.batch_size,
            padding=self.padding,
            answer_ends=self.answer_ends,
            on_batch=on_answers,
        )


@dataclass(frozen=True)
class Engine:
    """A model as the tasks use it.

    Attributes:
        label: Its name in results.
        tokenizer: Its tokenizer.
        uses_chat_template: Whether it was trained on conversations.
        load: Loads the model at the first call, and returns it; called only for predictions that are not cached.
        generator: Generates its answers.
        decoder: Decodes references that are tokens as its answers are decoded.
        cache: Its earlier predictions.
        compute_dtype: Type of the forward pass.
        batch_size: Most rows of one forward pass; fewer where memory is short.
        padding: Any token id.
        may_share: Whether the loaded model can compute the shared prefix of rows once.
        limit: Its positions.
    """

    label: str
    tokenizer: PreTrainedTokenizerBase
    uses_chat_template: bool
    load: Callable[[], nn.Module]
    generator: Generator
    decoder: AnswerDecoder
    cache: PredictionCache
    compute_dtype: torch.dtype
    batch_size: int
    padding: int
    may_share: Callable[[], bool]
    limit: PositionLimit

    def likelihoods(self, examples: Sequence[Example], on_progress: OnProgress) -> list[Likelihood]:
        """The likelihood of each example's target tokens, in the order of the examples.

        Raises:
            OutOfMemoryError: A row by itself does not fit.
        """
        # Cached by content: tasks that share rows, and tasks under another name, share predictions.
        keys = [digest(["likelihood", example.ids, example.is_target]) for example in examples]
        missing = self._missing(keys)
        done = len(keys) - len(missing)

        def keep(found: dict[int, Likelihood]) -> None:
            nonlocal done
            self.cache.add({keys[missing[index]]: asdict(likelihood) for index, likelihood in found.items()})
            done += len(found)
            on_progress(done, len(keys))

        if missing:
            model = self.load()
            on_progress(done, len(keys))
            likelihoods(
                model,
                [examples[index] for index in missing],
                compute_dtype=self.compute_dtype,
                batch_size=self.batch_size,
                padding=self.padding,
                may_share=self.may_share,
                on_batch=keep,
            )
        return [Likelihood(**self.cache.get(key)) for key in keys]

    def answers(self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_progress: OnProgress) -> list[str]:
        """The answer to each prompt (token ids), in the order of the prompts.

        Raises:
            OutOfMemoryError: A row by itself does not fit.
        """
        # With the name of the generator: ft and vLLM may differ by rounding.
        keys = [digest(["answer", self.generator.name, list(prompt), asdict(sampling)]) for prompt in prompts]
        missing = self._missing(keys)
        done = len(keys) - len(missing)

        def keep(found: dict[int, str]) -> None:
            nonlocal done
            if found:
                self.cache.add({keys[missing[index]]: text for index, text in found.items()})
            done += len(found)
            on_progress(done, len(keys))

        if missing:
            self.generator.generate([prompts[index] for index in missing], sampling, keep)
        return [self.cache.get(key) for key in keys]

    def _missing(self, keys: Sequence[str]) -> list[int]:
        """The indices of the keys that are not cached; of equal keys the first."""
        # Reversed: the last write of a key in the dict is its first occurrence in the list.
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        return sorted(index for key, index in first.items() if self.cache.get(key) is None)

"""A model that is asked row by row and answers in batches, and what it said before is not asked again.

Likelihoods are computed here, for every model and in one way. Answers come from a `Generator`: from our own generation
(`ModelGenerator`) or by vLLM (`VllmGenerator`, imported on demand).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from finetune.data.encode import Example
from finetune.evaluation.generation import Sampling, generate
from finetune.evaluation.likelihood import Likelihood, likelihoods
from finetune.evaluation.prediction_cache import PredictionCache, digest

Tell = Callable[[int, int], None]
"""Told how many rows are done, and of how many."""


class Generator(ABC):
    """What writes answers.

    Attributes:
        name: What it is called where results are shown, with its version if it is another program; answers are kept
            under it.
    """

    name: str

    @abstractmethod
    def write(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, tell: Callable[[dict[int, str]], None]
    ) -> None:
        """Continue each prompt until an end token of tokenizer or model, a stop of `sampling`, or the longest answer.

        Args:
            prompts: Token ids, at least one prompt.
            sampling: How tokens are chosen.
            tell: Told answers without special tokens, by the prompts' numbers, as soon as they are whole; and once
                told none, when the model is loaded.

        Raises:
            OutOfMemoryError: A row by itself does not fit.
        """

    def close(self) -> None:
        """Give back what it holds; it may be asked again."""
        return None


@dataclass(frozen=True)
class ModelGenerator(Generator):
    """Our own generation, by the model that likelihoods are computed with.

    Attributes:
        load: Loads the model, or gives the loaded one.
        tokenizer: Its tokenizer.
        batch_size: Most rows of one forward pass; fewer where memory is short.
        padding: Any token id.
    """

    load: Callable[[], nn.Module]
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    padding: int
    name = "ft"

    def write(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, tell: Callable[[dict[int, str]], None]
    ) -> None:
        """See the base class."""
        model = self.load()
        tell({})
        generate(
            model,
            self.tokenizer,
            prompts,
            sampling,
            batch_size=self.batch_size,
            padding=self.padding,
            tell_batch=tell,
        )


@dataclass(frozen=True)
class Engine:
    """What answers the questions of tasks.

    Attributes:
        label: What it is called.
        tokenizer: Its tokenizer.
        uses_chat_template: Whether it was trained on conversations.
        load: Loads the model, or gives the loaded one; called only if something is asked that is not kept.
        generator: Writes its answers.
        kept: What it said before.
        compute_dtype: Type of the forward pass.
        batch_size: Most rows of one forward pass; fewer where memory is short.
        padding: Any token id.
        may_share: Whether the loaded model can compute once what rows begin with alike.
        positions: Tokens that it can read and write in one row; None where nothing says.
    """

    label: str
    tokenizer: PreTrainedTokenizerBase
    uses_chat_template: bool
    load: Callable[[], nn.Module]
    generator: Generator
    kept: PredictionCache
    compute_dtype: torch.dtype
    batch_size: int
    padding: int
    may_share: Callable[[], bool]
    positions: int | None

    def likelihoods(self, examples: Sequence[Example], tell: Tell) -> list[Likelihood]:
        """How likely the trained tokens of each example are.

        Raises:
            OutOfMemoryError: A row by itself does not fit.
        """
        keys = [digest(["likelihood", example.ids, example.is_target]) for example in examples]
        missing = self._missing(keys)
        done = len(keys) - len(missing)

        def keep(found: dict[int, Likelihood]) -> None:
            nonlocal done
            self.kept.add({keys[missing[number]]: asdict(likelihood) for number, likelihood in found.items()})
            done += len(found)
            tell(done, len(keys))

        if missing:
            model = self.load()
            tell(done, len(keys))
            likelihoods(
                model,
                [examples[number] for number in missing],
                compute_dtype=self.compute_dtype,
                batch_size=self.batch_size,
                padding=self.padding,
                may_share=self.may_share,
                tell=keep,
            )
        return [Likelihood(**self.kept.get(key)) for key in keys]

    def answers(self, prompts: Sequence[Sequence[int]], sampling: Sampling, tell: Tell) -> list[str]:
        """What is written after each prompt.

        Raises:
            OutOfMemoryError: A row by itself does not fit.
        """
        keys = [digest(["answer", self.generator.name, list(prompt), asdict(sampling)]) for prompt in prompts]
        missing = self._missing(keys)
        done = len(keys) - len(missing)

        def keep(found: dict[int, str]) -> None:
            nonlocal done
            if found:
                self.kept.add({keys[missing[number]]: text for number, text in found.items()})
            done += len(found)
            tell(done, len(keys))

        if missing:
            self.generator.write([prompts[number] for number in missing], sampling, keep)
        return [self.kept.get(key) for key in keys]

    def _missing(self, keys: Sequence[str]) -> list[int]:
        """The numbers of the keys that nothing is kept for; of equal ones the first."""
        first = {key: number for number, key in reversed(list(enumerate(keys)))}
        return sorted(number for key, number in first.items() if self.kept.get(key) is None)

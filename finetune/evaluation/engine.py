"""A model that is asked row by row and answers in batches, and what it said before is not asked again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from finetune.data.encode import Example
from finetune.evaluation.generation import Sampling, generate
from finetune.evaluation.kept import KeptResults, digest
from finetune.evaluation.likelihood import Likelihood, likelihoods

Tell = Callable[[int, int], None]
"""Told how many rows are done, and of how many."""


@dataclass(frozen=True)
class Engine:
    """What answers the questions of tasks.

    Attributes:
        label: What it is called.
        tokenizer: Its tokenizer.
        in_conversation: Whether it was trained on conversations.
        load: Loads the model; called only if something is asked that is not kept.
        kept: What it said before.
        compute_dtype: Type of the forward pass.
        batch_size: Most rows of one forward pass; fewer where memory is short.
        padding: Any token id.
        positions: Tokens that it can read and write in one row; None where nothing says.
    """

    label: str
    tokenizer: PreTrainedTokenizerBase
    in_conversation: bool
    load: Callable[[], nn.Module]
    kept: KeptResults
    compute_dtype: torch.dtype
    batch_size: int
    padding: int
    positions: int | None

    @cached_property
    def _model(self) -> nn.Module:
        return self.load()

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
            model = self._model
            tell(done, len(keys))
            likelihoods(
                model,
                [examples[number] for number in missing],
                compute_dtype=self.compute_dtype,
                batch_size=self.batch_size,
                padding=self.padding,
                tell=keep,
            )
        return [Likelihood(**self.kept.get(key)) for key in keys]

    def answers(self, prompts: Sequence[Sequence[int]], sampling: Sampling, tell: Tell) -> list[str]:
        """What the model writes after each prompt.

        Raises:
            OutOfMemoryError: A row by itself does not fit.
        """
        keys = [digest(["answer", list(prompt), asdict(sampling)]) for prompt in prompts]
        missing = self._missing(keys)
        done = len(keys) - len(missing)

        def keep(found: dict[int, str]) -> None:
            nonlocal done
            self.kept.add({keys[missing[number]]: text for number, text in found.items()})
            done += len(found)
            tell(done, len(keys))

        if missing:
            model = self._model
            tell(done, len(keys))
            generate(
                model,
                self.tokenizer,
                [prompts[number] for number in missing],
                sampling,
                batch_size=self.batch_size,
                padding=self.padding,
                tell_batch=keep,
            )
        return [self.kept.get(key) for key in keys]

    def _missing(self, keys: Sequence[str]) -> list[int]:
        """The numbers of the keys that nothing is kept for; of equal ones the first."""
        first = {key: number for number, key in reversed(list(enumerate(keys)))}
        return sorted(number for key, number in first.items() if self.kept.get(key) is None)

"""An `Engine` as a model of lm-evaluation-harness, with ft's templates, batches and prediction cache."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from finetune.data.encode import Example
from finetune.data.text_tokens import prompt_ids
from finetune.errors import UnsupportedError
from finetune.evaluation.engine import Engine, OnProgress
from finetune.evaluation.generation import Sampling
from finetune.models.loading.chat_template_guard import render

MAX_POSITIONS = 2048
"""Context length where the model's is unknown."""

LONGEST_ANSWER = 256
"""Tokens of an answer where the task sets none; the default of the harness."""

KNOWN_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}


class InMemory(TemplateLM):  # type: ignore[misc]
    """A model of the harness.

    Tokens, truncation and stop strings equal those of the harness' own class for transformers (`HFLM`), so that scores
    are the same.

    Args:
        engine: The model.
        on_progress: Receives the number of requests that are done.
    """

    def __init__(self, engine: Engine, on_progress: OnProgress) -> None:
        super().__init__()
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.max_length = engine.limit.count or MAX_POSITIONS
        self._on_progress = on_progress

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Turns as text, through the chat template."""
        return render(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Token ids, without an end of text. By default with the tokenizer's beginning, unless the text has it."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        if add_special_tokens:
            return prompt_ids(self.tokenizer, string)
        return list(self.tokenizer.encode(string, add_special_tokens=False))

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        examples = []
        for _, context, continuation in requests:
            ids = (context + continuation)[-(self.max_length + 1) :]  # the last token is predicted, not read
            before = max(1, len(ids) - len(continuation))  # the first token has no prediction
            examples.append(Example(ids, [False] * before + [True] * (len(ids) - before)))
        return [(each.log_prob, each.is_greedy) for each in self.engine.likelihoods(examples, self._on_progress)]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation after its context, and whether greedy decoding would generate it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of full texts, longer ones in windows."""
        windows = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        found = iter(self._loglikelihood_tokens([window for of_text in windows for window in of_text]))
        return [math.fsum(next(found)[0] for _ in of_text) for of_text in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to its first stop string.

        Raises:
            UnsupportedError: The task needs a way of sampling that ft lacks.
        """
        prompts, groups = [], dict[Sampling, list[int]]()
        repeats: Counter[tuple[str, Sampling]] = Counter()
        for index, request in enumerate(requests):
            text, settings = request.args
            sampling = _sampling(settings)
            sampled_before = repeats[text, sampling] if sampling.temperature else 0
            repeats[text, sampling] += 1
            # A task may ask for several samples of one prompt. They need different seeds, or the cache would return the
            # first one again.
            groups.setdefault(replace(sampling, seed=sampled_before), []).append(index)
            room = self.max_length - sampling.max_new_tokens
            if room <= 0:
                raise UnsupportedError(
                    f"the task asks for {sampling.max_new_tokens} tokens of a model with {self.max_length} positions",
                    where=self.engine.label,
                    hint="drop the task",
                )
            prompts.append(self.tok_encode(text)[-room:])
        answers = [""] * len(requests)
        done = 0
        for sampling, indices in groups.items():
            written = self.engine.answers(
                [prompts[index] for index in indices],
                sampling,
                lambda rows, _, before=done: self._on_progress(before + rows, len(requests)),  # type: ignore[misc]
            )
            done += len(indices)
            for index, text in zip(indices, written, strict=True):
                answers[index] = text
        return answers


def _sampling(settings: dict[str, Any]) -> Sampling:
    kwargs = normalize_gen_kwargs(settings, LONGEST_ANSWER)
    if unknown := sorted(set(kwargs) - KNOWN_SETTINGS):
        raise UnsupportedError(
            f"the task sets {', '.join(unknown)} for its answers, which ft eval does not know",
            hint="drop the task",
        )
    until = kwargs.get("until") or []
    return Sampling(
        max_new_tokens=kwargs["max_gen_toks"],
        temperature=float(kwargs["temperature"]),
        top_p=float(kwargs.get("top_p", 1.0)),
        stops=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
        keeps_control_tokens=False,  # as the harness decodes answers
    )

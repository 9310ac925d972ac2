"""Answers written by a model, in batches. Shape legend: B prompts, T tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from finetune.evaluation.batching import in_batches
from finetune.models.fsdp import sharded_base

Tell = Callable[[str], None]
"""Told an answer piece by piece while it is written."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: Longest answer in tokens.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_p: Draw from the likeliest tokens that together reach this probability.
        seed: Of the draw.
        stops: Texts of which the first that is written ends the answer, and does not belong to it.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int,
    padding: int,
    report_rows: Callable[[int], None] = lambda rows: None,
    options_of: Callable[[Sequence[int]], dict[str, Any]] = lambda rows: {},
    tell: Tell | None = None,
    tell_batch: Callable[[dict[int, str]], None] = lambda answers: None,
) -> list[str]:
    """Continue each prompt until the end-of-turn token, a stop of `sampling`, or the longest answer.

    Args:
        model: A causal language model, with or without an adapter. Of one of which processes hold shares, all of them
            must ask for the same.
        tokenizer: Decodes; its end-of-turn token ends an answer.
        prompts: Token ids.
        sampling: How tokens are chosen.
        batch_size: Most prompts that are continued together; fewer where memory is short.
        padding: Any token id; prompts are padded on the left and masked.
        report_rows: Told how many prompts are done.
        options_of: What else `model.generate` is given for prompts of these numbers.
        tell: Told the answer while it is written; for one prompt.
        tell_batch: Told the answers of a batch by the prompts' numbers, as soon as they are whole.

    Returns:
        The answers in the order of the prompts, without special tokens.

    Raises:
        OutOfMemoryError: A prompt by itself does not fit.
    """
    assert tell is None or len(prompts) == 1
    was_training = model.training
    model.eval()
    torch.manual_seed(sampling.seed)
    draw = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.temperature else {}
    device = next(model.parameters()).device

    def work(chosen: list[int]) -> dict[int, str]:
        longest = max(len(prompts[index]) for index in chosen)
        rows = [[padding] * (longest - len(prompts[i])) + list(prompts[i]) for i in chosen]
        mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]
        stops = {"stopping_criteria": [_Stop(tokenizer, sampling.stops)]} if sampling.stops else {}
        written_BT = model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=bool(sampling.temperature),
            pad_token_id=padding,
            eos_token_id=end_tokens(model.generation_config, tokenizer),
            streamer=None if tell is None else _Stream(tokenizer, tell),
            **draw,
            **stops,
            **options_of(chosen),
        )[:, longest:]
        texts = tokenizer.batch_decode(written_BT, skip_special_tokens=True)
        return {index: up_to(text, sampling.stops) for index, text in zip(chosen, texts, strict=True)}

    answers = [""] * len(prompts)
    done = 0
    try:
        may_halve = sharded_base(model) is None
        for chosen, written in in_batches([len(prompt) for prompt in prompts], batch_size, work, may_halve=may_halve):
            for index, text in written.items():
                answers[index] = text
            done += len(chosen)
            tell_batch(written)
            report_rows(done)
    finally:
        model.train(was_training)
    return answers


def end_tokens(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those that the model's own generation settings name."""
    named = settings.eos_token_id
    own = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return sorted({*own, *(named if isinstance(named, list) else [named] if named is not None else [])})


def up_to(text: str, stops: Sequence[str]) -> str:
    """What stands before the first of the stops."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


class _Stop(StoppingCriteria):
    """Ends each row of a batch at the first of some texts.

    The end of what is written is decoded anew for each token: which tokens write a text depends on what stands around.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        # Every token writes at least a byte, or nothing and is special; a letter before may be cut in half.
        self.window = max(len(stop.encode()) for stop in stops) + 4
        self.written = 0

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        """Which rows are at their end, shape (B,)."""
        self.written += 1
        tails = self.tokenizer.batch_decode(input_ids[:, -min(self.window, self.written) :], skip_special_tokens=True)
        return torch.tensor([any(stop in tail for stop in self.stops) for tail in tails], device=input_ids.device)


class _Stream(BaseStreamer):
    """Tells the text of one row token by token; all pieces together are the answer as `generate` returns it.

    What is written is decoded as a whole each time: many tokens say what they say only behind the ones before.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tell: Tell) -> None:
        self.tokenizer, self.tell = tokenizer, tell
        self.ids: list[int] | None = None
        self.told = ""

    def put(self, value: Tensor) -> None:
        """Take the prompt, which comes first and is not told, or the next token."""
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        text = self._text()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the rest of a letter is still to come
            self._tell_up_to(text)

    def end(self) -> None:
        """Tell what was held back."""
        self._tell_up_to(self._text())

    def _text(self) -> str:
        return self.tokenizer.decode(self.ids or [], skip_special_tokens=True)

    def _tell_up_to(self, text: str) -> None:
        if piece := text[len(self.told) :]:
            self.tell(piece)
            self.told = text

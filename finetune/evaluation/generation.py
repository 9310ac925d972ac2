"""Answers written by a model, in batches. Shape legend: B prompts, T tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

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
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


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
) -> list[str]:
    """Continue each prompt until the end-of-turn token or the longest answer.

    Args:
        model: A causal language model, with or without an adapter.
        tokenizer: Decodes; its end-of-turn token ends an answer.
        prompts: Token ids.
        sampling: How tokens are chosen.
        batch_size: Prompts that are continued together.
        padding: Any token id; prompts are padded on the left and masked.
        report_rows: Told how many prompts are done.
        options_of: What else `model.generate` is given for prompts of these numbers.
        tell: Told the answer while it is written; for one prompt.

    Returns:
        The answers in the order of the prompts, without special tokens.
    """
    assert tell is None or len(prompts) == 1
    was_training = model.training
    model.eval()
    torch.manual_seed(sampling.seed)
    answers = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for first in range(0, len(prompts), batch_size):
        chosen = by_length[first : first + batch_size]
        longest = max(len(prompts[index]) for index in chosen)
        rows = [[padding] * (longest - len(prompts[i])) + list(prompts[i]) for i in chosen]
        mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]
        device = next(model.parameters()).device
        draw = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.temperature else {}
        written_BT = model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=bool(sampling.temperature),
            pad_token_id=padding,
            eos_token_id=end_tokens(model, tokenizer),
            streamer=None if tell is None else _Stream(tokenizer, tell),
            **draw,
            **options_of(chosen),
        )[:, longest:]
        for index, tokens in zip(chosen, written_BT, strict=True):
            answers[index] = tokenizer.decode(tokens, skip_special_tokens=True)
        report_rows(min(first + batch_size, len(prompts)))
    model.train(was_training)
    return answers


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those that the model's own generation settings name."""
    named = getattr(model.generation_config, "eos_token_id", None)
    own = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return sorted({*own, *(named if isinstance(named, list) else [named] if named is not None else [])})


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

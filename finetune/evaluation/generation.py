"""Batched generation of answers. Shape legend: B prompts, T tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from finetune.data.encode import Reference
from finetune.evaluation.batching import in_batches
from finetune.models.fsdp import sharded_base
from finetune.models.kernels.length_rotation import length_rotation
from finetune.models.loading.load import named_ends

OnText = Callable[[str], None]
"""Receives an answer piece by piece while it is generated."""


@dataclass(frozen=True)
class Sampling:
    """Selection of the next token, and the end of an answer.

    Attributes:
        max_new_tokens: Longest answer in tokens.
        temperature: 0 is greedy decoding; above, tokens are sampled.
        top_p: Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751): sample from the most probable tokens whose
            probabilities add up to this.
        seed: Of the sampling.
        stops: Stop strings. The first one that is generated ends the answer and is not part of it.
        keeps_control_tokens: Whether control tokens in an answer are part of its text, but for ends, padding and a
            beginning of text.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()
    keeps_control_tokens: bool = True


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int,
    padding: int,
    answer_ends: Sequence[int] = (),
    report_rows: Callable[[int], None] = lambda rows: None,
    options_of: Callable[[Sequence[int]], dict[str, Any]] = lambda rows: {},
    on_text: OnText | None = None,
    on_batch: Callable[[dict[int, str]], None] = lambda answers: None,
) -> list[str]:
    """Continue each prompt until an end token, a stop of `sampling`, or the longest answer.

    Args:
        model: A causal language model, with or without an adapter. If it is sharded, all processes must call this
            function with the same arguments.
        tokenizer: Decodes; its end token ends an answer.
        prompts: Token ids.
        sampling: Selection of tokens.
        batch_size: Most prompts of one batch; fewer where memory is short.
        padding: Any token id; prompts are padded on the left and masked.
        answer_ends: Ids that end an answer, beside those of tokenizer and model: the ends of the training.
        report_rows: Receives the number of prompts that are done.
        options_of: Further arguments of `model.generate`, for the prompts of these indices.
        on_text: Receives the answer while it is generated; for a single prompt only.
        on_batch: Receives the answers of a batch, by the indices of their prompts, when they are complete.

    Returns:
        The answers in the order of the prompts, as `AnswerDecoder` decodes them.

    Raises:
        OutOfMemoryError: A prompt by itself does not fit.
    """
    assert on_text is None or len(prompts) == 1
    was_training = model.training
    model.eval()
    torch.manual_seed(sampling.seed)  # `model.generate` samples from the global generator
    sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.temperature else {}
    device = next(model.parameters()).device
    ends = end_tokens(model.generation_config, tokenizer, answer_ends)
    decoder = AnswerDecoder(tokenizer, ends, sampling.keeps_control_tokens)

    def work(chosen: list[int]) -> dict[int, str]:
        # Padding on the left: the last position of every row is the end of its prompt, where generation begins.
        longest = max(len(prompts[index]) for index in chosen)
        rows = [[padding] * (longest - len(prompts[i])) + list(prompts[i]) for i in chosen]
        mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]
        stops = {"stopping_criteria": [_Stop(decoder, sampling.stops)]} if sampling.stops else {}
        written_BT = model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=bool(sampling.temperature),
            pad_token_id=padding,
            eos_token_id=ends,
            streamer=None if on_text is None else _Stream(decoder, on_text),
            **sampled,
            **stops,
            **options_of(chosen),
        )[:, longest:]  # without the prompts
        texts = map(decoder.text, written_BT.tolist())
        # The texts still have their stop strings, and padding after them.
        return {index: up_to(text, sampling.stops) for index, text in zip(chosen, texts, strict=True)}

    answers = [""] * len(prompts)
    done = 0
    try:
        # Every process of a sharded model takes part in each all-gather: none may split its batches by itself.
        may_halve = sharded_base(model) is None
        lengths = [len(prompt) for prompt in prompts]
        groups = _groups(model, lengths, sampling.max_new_tokens)
        for chosen, written in in_batches(lengths, batch_size, work, groups=groups, may_halve=may_halve):
            for index, text in written.items():
                answers[index] = text
            done += len(chosen)
            on_batch(written)
            report_rows(done)
    finally:
        model.train(was_training)
    return answers


def _groups(model: nn.Module, lengths: Sequence[int], new_tokens: int) -> list[int] | None:
    """The group of each prompt, where the model's rotation depends on the longest row of a batch."""
    rotation = length_rotation(model)
    return None if rotation is None else [rotation.generation_group(length, new_tokens) for length in lengths]


def end_tokens(
    settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase, answer_ends: Sequence[int] = ()
) -> list[int]:
    """The ids that end an answer: those of the tokenizer, of the model's generation settings and of the training."""
    own = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return sorted({*own, *named_ends(settings), *answer_ends})


def before_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first one that ends an answer."""
    return list(ids[: next((index for index, token in enumerate(ids) if token in ends), len(ids))])


@dataclass(frozen=True)
class AnswerDecoder:
    """From the tokens of an answer to its text; references that are tokens are decoded alike.

    Attributes:
        tokenizer: The model's.
        ends: Ids that end an answer.
        keeps_control_tokens: As in `Sampling`.
    """

    tokenizer: PreTrainedTokenizerBase
    ends: Sequence[int]
    keeps_control_tokens: bool = True

    def text(self, ids: Sequence[int]) -> str:
        """The text before the first end, without padding and beginnings of text."""
        return self.span(before_end(ids, self.ends))

    def reference(self, reference: Reference) -> str:
        """The text of a reference answer."""
        return reference if isinstance(reference, str) else self.text(reference)

    def span(self, ids: Sequence[int]) -> str:
        """The text of tokens of an answer, without ends, padding and beginnings of text."""
        tokenizer = self.tokenizer
        dropped = {*self.ends, tokenizer.pad_token_id, tokenizer.bos_token_id}
        kept = [token for token in ids if token not in dropped]
        text: str = tokenizer.decode(kept, skip_special_tokens=not self.keeps_control_tokens)
        return text


def up_to(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min((index for stop in stops if (index := text.find(stop)) >= 0), default=len(text))]


class _Stop(StoppingCriteria):
    """Ends each row of a batch at its first stop string.

    The last tokens are decoded again at every step, because the tokens of a text depend on the text around it.
    """

    def __init__(self, decoder: AnswerDecoder, stops: Sequence[str]) -> None:
        self.decoder, self.stops = decoder, stops
        # In tokens: each one decodes to at least one byte, unless it is special. 4 more for a character that the
        # window cuts in half at its beginning.
        self.window = max(len(stop.encode()) for stop in stops) + 4
        self.written = 0

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        """Whether each row has ended, shape (B,)."""
        self.written += 1  # never decode the prompt: a stop string in it does not count
        tails = map(self.decoder.span, input_ids[:, -min(self.window, self.written) :].tolist())
        return torch.tensor([any(stop in tail for stop in self.stops) for tail in tails], device=input_ids.device)


class _Stream(BaseStreamer):
    """Streams the text of one row token by token; the concatenated pieces are the answer that `generate` returns.

    The full answer is decoded at every token, because the text of many tokens depends on the tokens before them.
    """

    def __init__(self, decoder: AnswerDecoder, on_text: OnText) -> None:
        self.decoder, self.on_text = decoder, on_text
        self.ids: list[int] | None = None
        self.sent = ""

    def put(self, value: Tensor) -> None:
        """Take the next token. The first call has the prompt, which is not streamed."""
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        text = self._text()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the remaining bytes of a character are still to come
            self._send_up_to(text)

    def end(self) -> None:
        """Send the rest, with a character that stayed incomplete."""
        self._send_up_to(self._text())

    def _text(self) -> str:
        return self.decoder.text(self.ids or [])

    def _send_up_to(self, text: str) -> None:
        if piece := text[len(self.sent) :]:
            self.on_text(piece)
            self.sent = text

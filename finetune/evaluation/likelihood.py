"""How likely a model finds given tokens, row by row. Shape legend: N trained tokens of a batch, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from finetune.data.collate import Batch, flattened, padded, shared_prefix_length
from finetune.data.encode import Example
from finetune.evaluation.batching import in_batches
from finetune.models.loading.dtype import autocast
from finetune.train.loss import visit_log_probs

WORTH_SHARING = 2000
"""Tokens that rows must begin with alike for a model to be asked whether it computes them once: ten small passes."""


@dataclass(frozen=True)
class Likelihood:
    """What a model makes of the trained tokens of a row.

    Attributes:
        log_prob: The logarithm of their probability, in nats.
        tokens: Their number.
        is_greedy: Whether each of them is the likeliest.
    """

    log_prob: float
    tokens: int
    is_greedy: bool


def likelihoods(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    compute_dtype: torch.dtype,
    batch_size: int,
    padding: int,
    may_share: Callable[[], bool],
    tell: Callable[[dict[int, Likelihood]], None],
) -> None:
    """Work out how likely each example's trained tokens are.

    Examples that differ in nothing but their last token, such as the letters of a multiple choice, go through the
    model as one row. What others begin with alike, such as a question or the examples before it, is computed once for
    all of a pass.

    Args:
        model: Put into evaluation mode, and back afterwards.
        examples: Each trains a token that is not its first.
        compute_dtype: Type of the forward pass.
        batch_size: Most rows of one forward pass, or as many tokens in rows that share some; fewer where memory is
            short.
        padding: Any token id.
        may_share: Whether the model can compute once what rows begin with alike; asked where they do.
        tell: Told the results of a batch, by the example's number.

    Raises:
        OutOfMemoryError: A row by itself does not fit.
    """
    alike: dict[tuple[tuple[int, ...], tuple[bool, ...]], list[int]] = {}
    for number, example in enumerate(examples):
        end = tuple(example.ids[:-1]) if example.is_target[-1] else tuple(example.ids)
        alike.setdefault((end, tuple(example.is_target)), []).append(number)
    groups = sorted(alike.values(), key=lambda group: examples[group[0]].ids)
    firsts = [examples[group[0]] for group in groups]
    lengths = [len(first.ids) for first in firsts]
    shared = [0, *(shared_prefix_length(one, other) for one, other in pairwise(firsts))]
    shares = sum(shared) >= WORTH_SHARING and may_share()
    make_batch = partial(flattened, shares_prefixes=True) if shares else partial(padded, padding=padding)

    def work(rows: list[int]) -> dict[int, Likelihood]:
        return _of_batch(model, examples, [groups[row] for row in rows], compute_dtype, make_batch)

    was_training = model.training
    model.eval()
    try:
        for _, found in in_batches(lengths, batch_size, work, shared=shared if shares else None):
            tell(found)
    finally:
        model.train(was_training)


@torch.no_grad()
def _of_batch(
    model: nn.Module,
    examples: Sequence[Example],
    groups: Sequence[Sequence[int]],
    compute_dtype: torch.dtype,
    make_batch: Callable[[Sequence[Example]], Batch],
) -> dict[int, Likelihood]:
    """The likelihoods of the examples of some groups, by number; the first of a group goes through the model."""
    device = next(model.parameters()).device
    batch = make_batch([examples[group[0]] for group in groups]).to(device)
    ends = _last_targets([examples[group[0]].targets for group in groups])
    of_label: list[Tensor] = []
    is_greedy: list[Tensor] = []
    of_ends: dict[int, tuple[Tensor, int]] = {}
    seen = 0

    def visit(log_probs_NV: Tensor, labels_N: Tensor) -> None:
        nonlocal seen
        top1_N = log_probs_NV.argmax(-1)
        of_label.append(log_probs_NV.gather(1, labels_N[:, None]).squeeze(1))
        is_greedy.append(top1_N == labels_N)
        for place in range(seen, seen + len(labels_N)):
            if place in ends and len(group := groups[ends[place]]) > 1:
                last = torch.tensor([examples[number].ids[-1] for number in group], device=device)
                of_ends[ends[place]] = log_probs_NV[place - seen, last], int(top1_N[place - seen])
        seen += len(labels_N)

    with autocast(device, compute_dtype):
        visit_log_probs(model, batch, visit)
    probs, greedy = torch.cat(of_label).double().tolist(), torch.cat(is_greedy).tolist()
    found, begin = {}, 0
    for row, group in enumerate(groups):
        targets = examples[group[0]].targets
        own, own_greedy = probs[begin : begin + targets], greedy[begin : begin + targets]
        begin += targets
        found[group[0]] = Likelihood(sum(own), targets, all(own_greedy))
        if row not in of_ends:
            continue
        ends_chances, top1 = of_ends[row]
        for number, chance in zip(group, ends_chances.tolist(), strict=True):
            is_last = examples[number].ids[-1] == top1
            found[number] = Likelihood(sum(own[:-1]) + chance, targets, all(own_greedy[:-1]) and is_last)
    return found


def _last_targets(counts: Sequence[int]) -> dict[int, int]:
    """Of each row, the place of its last trained token among those of all rows -> the row."""
    places, before = {}, 0
    for row, count in enumerate(counts):
        before += count
        places[before - 1] = row
    return places

"""Log-likelihoods of given tokens, row by row. Shape legend: N target tokens of a batch, V vocabulary."""

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
from finetune.models.kernels.length_rotation import length_rotation
from finetune.models.loading.dtype import autocast
from finetune.train.loss import visit_log_probs

WORTH_SHARING = 2000
"""Least number of shared prefix tokens for prefix sharing: the check of a model costs ten small passes."""


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of the target tokens of a row.

    Attributes:
        log_prob: The logarithm of their joint probability, in nats.
        tokens: Their number.
        is_greedy: Whether each of them is the top-1 token, so that greedy decoding would generate them.
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
    on_batch: Callable[[dict[int, Likelihood]], None],
) -> None:
    """Compute the likelihood of each example's target tokens.

    Examples that differ in their last token only, such as the letters of a multiple choice, are one row of the forward
    pass. The shared prefix of other examples, such as a question or few-shot examples, is computed once a pass.

    Args:
        model: Set to evaluation mode, and back afterwards.
        examples: Each has a target token that is not its first token.
        compute_dtype: Type of the forward pass.
        batch_size: Most rows of one forward pass, or the tokens of so many rows where prefixes are shared; fewer where
            memory is short.
        padding: Any token id.
        may_share: Whether the model can compute a shared prefix once; called only if there are prefixes to share.
        on_batch: Receives the results of a batch, by the index of the example.

    Raises:
        OutOfMemoryError: A row by itself does not fit.
    """
    rotation = length_rotation(model)
    group_of = (lambda tokens: 0) if rotation is None else rotation.group
    groups = sorted(shared_last_token_groups(examples), key=lambda group: group_of(len(examples[group[0]].ids)))
    firsts = [examples[group[0]] for group in groups]
    lengths = [len(first.ids) for first in firsts]
    # Neighbours in sorted order share the longest prefixes; the first row shares with none.
    shared = [0, *(shared_prefix_length(one, other) for one, other in pairwise(firsts))]
    shares = sum(shared) >= WORTH_SHARING and may_share()
    make_batch = partial(flattened, shares_prefixes=True) if shares else partial(padded, padding=padding)

    def work(rows: list[int]) -> dict[int, Likelihood]:
        return _of_batch(model, examples, [groups[row] for row in rows], compute_dtype, make_batch)

    was_training = model.training
    model.eval()
    try:
        kinds = [group_of(length) for length in lengths]
        for _, found in in_batches(lengths, batch_size, work, shared=shared if shares else None, groups=kinds):
            on_batch(found)
    finally:
        model.train(was_training)


def shared_last_token_groups(examples: Sequence[Example]) -> list[list[int]]:
    """Indices of examples, grouped by all tokens but the last, which one forward pass of a group's first can score.

    The logits before the last token do not depend on it. Two choices of a question are therefore one row:

        ids      "Which is red?"  A        examples 0 and 1 are the group [0, 1]; the row is example 0
                 "Which is red?"  B        log p(A) and log p(B) are two entries of the same distribution
        logits                 ^ at this position

    An example whose last token is no target has nothing to score there: it shares a row with equal examples only.
    Groups are sorted by their tokens, so that neighbours have the longest shared prefixes.
    """
    by_prefix: dict[tuple[tuple[int, ...], tuple[bool, ...]], list[int]] = {}
    for index, example in enumerate(examples):
        prefix = tuple(example.ids[:-1]) if example.is_target[-1] else tuple(example.ids)
        by_prefix.setdefault((prefix, tuple(example.is_target)), []).append(index)
    return sorted(by_prefix.values(), key=lambda group: examples[group[0]].ids)


@torch.no_grad()
def _of_batch(
    model: nn.Module,
    examples: Sequence[Example],
    groups: Sequence[Sequence[int]],
    compute_dtype: torch.dtype,
    make_batch: Callable[[Sequence[Example]], Batch],
) -> dict[int, Likelihood]:
    """The likelihoods of all examples of some groups, by index; only the first example of a group is computed."""
    device = next(model.parameters()).device
    batch = make_batch([examples[group[0]] for group in groups]).to(device)
    row_of_last_target = _rows_by_last_target([examples[group[0]].targets for group in groups])
    of_label: list[Tensor] = []
    is_greedy: list[Tensor] = []
    of_last_tokens: dict[int, tuple[Tensor, int]] = {}
    seen = 0

    # The N target tokens of the batch come in chunks, row after row, because (N, V) log-probabilities of a whole batch
    # may not fit into memory. `seen` is the offset of a chunk.
    def visit(log_probs_NV: Tensor, labels_N: Tensor) -> None:
        nonlocal seen
        top1_N = log_probs_NV.argmax(-1)
        of_label.append(log_probs_NV.gather(1, labels_N[:, None]).squeeze(1))
        is_greedy.append(top1_N == labels_N)
        for position in range(seen, seen + len(labels_N)):
            row = row_of_last_target.get(position)
            # The distribution of a row's last target scores the last token of every example of its group.
            if row is not None and len(group := groups[row]) > 1:
                last = torch.tensor([examples[index].ids[-1] for index in group], device=device)
                of_last_tokens[row] = log_probs_NV[position - seen, last], int(top1_N[position - seen])
        seen += len(labels_N)

    with autocast(device, compute_dtype):
        visit_log_probs(model, batch, visit)
    # float64 for the sums: a row may have thousands of tokens.
    log_probs, greedy = torch.cat(of_label).double().tolist(), torch.cat(is_greedy).tolist()
    found, begin = {}, 0
    for row, group in enumerate(groups):
        targets = examples[group[0]].targets
        own, own_greedy = log_probs[begin : begin + targets], greedy[begin : begin + targets]
        begin += targets
        found[group[0]] = Likelihood(sum(own), targets, all(own_greedy))
        if row not in of_last_tokens:
            continue
        last_log_probs, top1 = of_last_tokens[row]
        for index, log_prob in zip(group, last_log_probs.tolist(), strict=True):
            is_top1 = examples[index].ids[-1] == top1
            found[index] = Likelihood(sum(own[:-1]) + log_prob, targets, all(own_greedy[:-1]) and is_top1)
    return found


def _rows_by_last_target(counts: Sequence[int]) -> dict[int, int]:
    """Each row by the position of its last target token among the N of the batch, given the targets of each row."""
    rows, end = {}, 0
    for row, count in enumerate(counts):
        end += count
        rows[end - 1] = row
    return rows

"""AdaLoRA's allocator: budget schedule, scores, selection, resume."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator as PeftRankAllocator
from torch import Tensor, nn

from finetune.adapters.rank_allocation import Budget, RankAllocator, Triplets

SIZES = {"q": (4, 6, 10), "v": (4, 3, 8), "down": (6, 7, 5)}
"""Rank, outputs and inputs of three layers."""

BUDGET = Budget(first=14, last=5, initial_steps=3, falling_steps=14, every=2)
STEPS = 22


def layers(seed: int = 0) -> dict[str, Triplets]:
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name, (rank, outputs, inputs) in SIZES.items():
        shapes = ((rank, inputs), (rank, 1), (outputs, rank))
        found[name] = Triplets(*(nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes))
    return found


def allocator(budget: Budget = BUDGET) -> RankAllocator:
    return RankAllocator(layers(), budget, sensitivity_decay=0.85, uncertainty_decay=0.7)


def take_step(trained: dict[str, Triplets], step: int) -> None:
    """Simulate an optimizer: random gradients, and a random update that does not depend on them."""
    draw = torch.Generator().manual_seed(100 + step)
    with torch.no_grad():
        for factors in trained.values():
            for weight in factors:
                weight.grad = torch.randn(weight.shape, generator=draw) * (1 + step % 3)
                weight.add_(0.1 * torch.randn(weight.shape, generator=draw))


def run(tested: RankAllocator, steps: range = range(1, STEPS + 1)) -> Iterator[int]:
    for step in steps:
        take_step(tested.layers, step)
        tested.after_step(step)
        yield step


def nonzero(tested: RankAllocator) -> int:
    return sum(int((factors.e_R1 != 0).sum()) for factors in tested.layers.values())


# The budget


@pytest.mark.parametrize("initial", [0, 3])
@pytest.mark.parametrize("falling", [1, 2, 17, 1000])
@pytest.mark.parametrize(("first", "last"), [(14, 5), (2520, 1680), (7, 6)])
def test_budget_falls_from_first_to_last_exactly(initial: int, falling: int, first: int, last: int):
    budget = Budget(first, last, initial, falling, every=1)
    schedule = [budget.after(step) for step in range(initial + falling + 5)]
    assert schedule[: initial + 1] == [first] * (initial + 1)
    assert schedule[initial + falling :] == [last] * 5
    assert schedule == sorted(schedule, reverse=True)


def test_printed_budget_equation_misses_both_ends():
    """With t_f in the numerator too, as in the paper's equation of the budget."""
    total, initial, final = 100, 10, 40

    def printed(step: int) -> float:
        return 5 + (14 - 5) * (1 - (step - initial - final) / (total - initial - final)) ** 3

    budget = Budget(14, 5, initial, total - initial - final, every=1)
    assert abs(printed(initial) - budget.after(initial)) > 1
    assert abs(printed(total - final) - budget.after(total - final)) > 1


def test_is_due_at_interval_and_at_final_step():
    due = [step for step in range(STEPS + 1) if BUDGET.is_due(step)]
    assert due == [4, 6, 8, 10, 12, 14, 16, 17]


# Scores and choices


def plain_scores(history: list[tuple[Tensor, Tensor]]) -> list[list[float]]:
    """The score of every entry of a matrix from its weights and gradients at each step, number by number."""
    rows, columns = history[0][0].shape
    found = [[0.0] * columns for _ in range(rows)]
    for i in range(rows):
        for j in range(columns):
            smoothed = uncertainty = 0.0
            for weight, gradient in history:
                sensitivity = abs(float(weight[i, j]) * float(gradient[i, j]))
                smoothed = 0.85 * smoothed + 0.15 * sensitivity
                uncertainty = 0.7 * uncertainty + 0.3 * abs(sensitivity - smoothed)
            found[i][j] = smoothed * uncertainty
    return found


def test_scores_match_scalar_reference():
    tested = allocator()
    seen: dict[str, list[list[tuple[Tensor, Tensor]]]] = {name: [[], [], []] for name in SIZES}
    for step in range(1, 8):
        take_step(tested.layers, step)
        for name, factors in tested.layers.items():
            for history, weight in zip(seen[name], factors, strict=True):
                history.append((weight.detach().clone(), weight.grad.clone()))
        tested.after_step(step)
    for name, histories in seen.items():
        a, e, b = map(plain_scores, histories)
        expected = [e[k][0] + sum(a[k]) / len(a[k]) + sum(row[k] for row in b) / len(b) for k in range(SIZES[name][0])]
        assert tested.scores(name).tolist() == pytest.approx(expected, rel=1e-5)


def test_allocation_keeps_highest_scores_over_all_layers():
    tested = allocator()
    for step in run(tested):
        if not BUDGET.is_due(step):
            continue
        ranked = sorted(
            ((-float(score), name, k) for name in SIZES for k, score in enumerate(tested.scores(name))),
        )
        expected = {(name, k) for _, name, k in ranked[: BUDGET.after(step)]}
        kept = {(name, k) for name in SIZES for k, stays in enumerate(tested.kept_R[name].tolist()) if stays}
        assert kept == expected
        zero = {(name, k) for name in SIZES for k, e in enumerate(tested.layers[name].e_R1[:, 0].tolist()) if e == 0}
        assert zero == {(name, k) for name in SIZES for k in range(SIZES[name][0])} - kept
    assert len(set(tested.ranks().values())) > 1  # ranks did move


class AsPeftNames(nn.Module):
    """Parameters under the names that PEFT's allocator looks for."""

    def __init__(self, trained: dict[str, Triplets]) -> None:
        super().__init__()
        for name, (a_RI, e_R1, b_OR) in trained.items():
            layer = nn.Module()
            for kind, weight in (("A", a_RI), ("E", e_R1), ("B", b_OR)):
                layer.register_module(f"lora_{kind}", nn.ParameterDict({"default": weight}))
            self.add_module(name, layer)


def test_allocation_matches_peft():
    tested = allocator(Budget(14, 6, 3, 14, every=2))
    others = layers()
    config = AdaLoraConfig(
        target_r=2, init_r=4, tinit=3, tfinal=STEPS - 17, deltaT=2, beta1=0.85, beta2=0.7, total_step=STEPS
    )
    model = AsPeftNames(others)
    theirs = PeftRankAllocator(model, config, "default")
    choices = 0
    for step in run(tested, range(1, 18)):
        take_step(others, step)
        _, pattern = theirs.update_and_allocate(model, step, force_mask=step == 17)
        if pattern is None:
            assert not tested.budget.is_due(step)
            continue
        choices += 1
        found = {f"{name}.lora_E.default": kept_R.tolist() for name, kept_R in tested.kept_R.items()}
        assert found == pattern
        assert sum(map(sum, pattern.values())) == tested.budget.after(step)
    assert choices == 8
    for name in SIZES:
        assert torch.equal(tested.layers[name].e_R1, others[name].e_R1)


def test_allocation_with_equal_scores_meets_budget():
    """PEFT's threshold would prune all of them."""
    tested = allocator()
    tested._choose(5)  # before any step, when all scores are zero
    assert tested.ranks() == {"q": 4, "v": 1, "down": 0}
    config = AdaLoraConfig(target_r=2, init_r=4, tinit=3, tfinal=5, total_step=STEPS)
    model = AsPeftNames(layers())
    theirs = PeftRankAllocator(model, config, "default")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    theirs.update_ipt(model)
    assert sum(map(sum, theirs.mask_to_budget(model, 5).values())) == 0


def test_pruned_triplet_can_return_until_last_allocation():
    tested = allocator()
    counts, came_back = [], []
    before = {name: kept_R.clone() for name, kept_R in tested.kept_R.items()}
    for step in run(tested):
        counts.append(nonzero(tested))
        if any((kept_R & ~before[name]).any() for name, kept_R in tested.kept_R.items()):
            came_back.append(step)
        before = {name: kept_R.clone() for name, kept_R in tested.kept_R.items()}
    assert came_back
    assert max(came_back) <= BUDGET.final_from
    assert counts[:5] == [14, 14, 14, BUDGET.after(4), 14]  # between two choices all of them train
    assert counts[BUDGET.final_from - 1 :] == [5] * (STEPS - BUDGET.final_from + 1)


def test_missing_gradient_counts_as_zero():
    without, with_zeros = allocator(), allocator()
    for step in range(1, STEPS + 1):
        for tested in (without, with_zeros):
            take_step(tested.layers, step)
        for weight in without.layers["v"]:
            weight.grad = None
        for weight in with_zeros.layers["v"]:
            weight.grad.zero_()
        without.after_step(step)
        with_zeros.after_step(step)
    assert without.ranks() == with_zeros.ranks()
    assert without.ranks()["v"] == 0


def test_overflowed_step_is_not_scored_but_counts_in_schedule():
    tested = allocator()
    for step in range(1, STEPS + 1):
        take_step(tested.layers, step)
        if step in (2, 17):
            tested.layers["q"].a_RI.grad[0, 0] = float("inf")
        tested.after_step(step)
    assert all(tensor.isfinite().all() for tensor in tested.tensors().values())
    assert sum(tested.ranks().values()) == nonzero(tested) == 5


# Resume


@pytest.mark.parametrize("stop", [2, 6, 9, 16, 17, 20])
def test_restored_tensors_resume_bitwise(stop: int):
    uninterrupted = allocator()
    list(run(uninterrupted))
    first = allocator()
    list(run(first, range(1, stop + 1)))
    second = allocator()
    hand_over(first, second)
    list(run(second, range(stop + 1, STEPS + 1)))
    found, expected = second.tensors(), uninterrupted.tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert all(torch.equal(second.layers[name].e_R1, uninterrupted.layers[name].e_R1) for name in SIZES)


@pytest.mark.parametrize(("dropped", "stop"), [("sensitivity", 9), ("uncertainty", 9), ("kept", 18)])
def test_resume_without_any_of_the_tensors_differs(dropped: str, stop: int):
    uninterrupted = allocator()
    list(run(uninterrupted))
    first = allocator()
    list(run(first, range(1, stop + 1)))
    second = allocator()
    hand_over(first, second, without=dropped)
    list(run(second, range(stop + 1, STEPS + 1)))
    found, expected = second.tensors(), uninterrupted.tensors()
    assert not all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def hand_over(old: RankAllocator, new: RankAllocator, without: str = "nothing") -> None:
    with torch.no_grad():
        for name, factors in old.layers.items():
            for weight, source in zip(new.layers[name], factors, strict=True):
                weight.copy_(source)
        theirs = old.tensors()
        for name, tensor in new.tensors().items():
            if not name.startswith(without):
                tensor.copy_(theirs[name])

"""Gates: parsing, matching, and errors."""

from __future__ import annotations

import math

import pytest

from finetune.errors import UsageError
from finetune.evaluation.gates import Gate

MEASURED = ["validation/loss", "validation/exact_match", "words/exact_match", "mmlu/acc", "mmlu/mmlu_law/acc"]


@pytest.mark.parametrize(
    ("text", "below", "at", "above"),
    [
        ("loss>=0.5", False, True, True),
        ("loss > 0.5", False, False, True),
        ("loss<=0.5", True, True, False),
        (" loss <5e-1", True, False, False),
    ],
)
def test_gate_holds_according_to_its_operator(text: str, below: bool, at: bool, above: bool):
    gate = Gate.parse(text)
    assert [gate.holds(value) for value in (0.4, 0.5, 0.6)] == [below, at, above]
    assert not gate.holds(math.nan)


@pytest.mark.parametrize(
    "text", ["", "loss", "loss=0.5", "loss==0.5", ">=0.5", "loss>=", "loss>=x", "loss>=nan", "a>b>1"]
)
def test_invalid_gate_is_an_error_with_an_example(text: str):
    with pytest.raises(UsageError) as caught:
        Gate.parse(text)
    assert caught.value.exit_code == 2
    assert "--gate 'exact_match>=0.8'" in str(caught.value.hint)


def test_gate_with_a_percentage_hints_at_the_fraction():
    with pytest.raises(UsageError) as caught:
        Gate.parse("exact_match>=80%")
    assert str(caught.value.hint).endswith("80% is 0.8")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("loss<1", ["validation/loss"]),
        ("held_out/loss<1", ["validation/loss"]),  # its name in earlier versions
        ("exact_match>=1", ["validation/exact_match", "words/exact_match"]),
        ("words/exact_match>=1", ["words/exact_match"]),
        ("acc>0", ["mmlu/acc"]),
        ("mmlu/mmlu_law/acc>0", ["mmlu/mmlu_law/acc"]),
    ],
)
def test_gate_on_a_metric_matches_every_task(text: str, names: list[str]):
    assert Gate.parse(text).matching(MEASURED) == names


def test_gate_on_an_unknown_metric_lists_measured_ones():
    with pytest.raises(UsageError, match="'f1' is not measured") as caught:
        Gate.parse("f1>0").matching(MEASURED)
    assert "validation/loss, validation/exact_match" in str(caught.value.hint)

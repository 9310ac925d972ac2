"""Section `sweep`: keys and value ranges that `ft sweep` searches. Training does not read it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetune.recipe.sections.section import OnResume, Section

MOST_REPEATS = 10

LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "brier_score")
"""Endings of the names of metrics of which a lower value is better, in ft and in lm-evaluation-harness."""


class SweptKey(Section):
    """Base class of the distributions of a swept key."""

    on_resume: ClassVar[OnResume] = OnResume.MAY_CHANGE
    key: str = Field(min_length=1, description="Dotted path of a key of the recipe, such as optimizer.learning_rate.")
    draw: str

    @property
    def values(self) -> Sequence[Any] | None:
        """All values in their order; None for a continuous range."""
        return None

    def holds(self, value: Any) -> bool:
        """Whether a value can be sampled."""
        raise NotImplementedError


class Numbers(SweptKey):
    """A range of numbers, inclusive."""

    low: float = Field(description="Smallest value.")
    high: float = Field(description="Largest value.")

    def holds(self, value: Any) -> bool:
        """Whether a number lies in the range."""
        return isinstance(value, int | float) and self.low <= value <= self.high


class Uniform(Numbers):
    """A number, sampled uniformly."""

    draw: Literal["uniform"]


class LogUniform(Numbers):
    """A number whose logarithm is sampled uniformly, as is usual for learning rates."""

    draw: Literal["log_uniform"]
    low: float = Field(gt=0, description="Smallest value.")


class Integer(Numbers):
    """An integer, sampled uniformly."""

    draw: Literal["integer"]
    low: int = Field(description="Smallest value.")
    high: int = Field(description="Largest value.")
    step: int = Field(1, ge=1, description="Distance between values, starting at low.")

    @property
    def values(self) -> range:
        """All integers of the range."""
        return range(self.low, self.high + 1, self.step)

    def holds(self, value: Any) -> bool:
        """Whether a number lies in the range, a multiple of `step` above `low`."""
        return isinstance(value, int) and super().holds(value) and (value - self.low) % self.step == 0


class Choice(SweptKey):
    """One of several values."""

    draw: Literal["choice"]
    choices: list[bool | int | float | str] = Field(min_length=1, description="Values: numbers, words, true or false.")

    @property
    def values(self) -> list[bool | int | float | str]:
        """The choices, each once."""
        return [value for index, value in enumerate(self.choices) if value not in self.choices[:index]]

    def holds(self, value: Any) -> bool:
        """Whether a value is among the choices."""
        return value in self.choices


Swept = Annotated[Uniform | LogUniform | Integer | Choice, Field(discriminator="draw")]


class Sweep(Section):
    """A sweep: trials are runs that differ in these keys, compared by validation loss or by a metric of `ft eval`."""

    on_resume: ClassVar[OnResume] = OnResume.MAY_CHANGE
    trials: int = Field(16, ge=1, description="Number of trials, including one with the recipe's values.")
    repeats: int = Field(
        1,
        ge=1,
        le=MOST_REPEATS,
        description="Runs of each trial, with training.seed, training.seed + 1, and so on, on the same rows. Trials "
        "are compared by the mean; with 3 or more its 95 % interval separates a difference from noise.",
    )
    goal: str | None = Field(
        None,
        pattern=r"^\S+$",
        description="Metric that trials are compared by, evaluated after each run as by ft eval: task/metric such as "
        "validation/exact_match, or the metric alone if one task has it. Null for the validation loss of the run.",
    )
    direction: Literal["minimize", "maximize"] | None = Field(
        None,
        description="Whether a low or a high goal is better; by default a low loss or perplexity, else a high one.",
    )
    sampler: Literal["grid", "tpe", "random"] | None = Field(
        None,
        description="grid: all combinations in order, the last key first. tpe: tree-structured Parzen estimator, after "
        "some random trials (arXiv 2304.11127). By default grid if all combinations of the keys fit into the trials, "
        "else tpe.",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the sampler.")
    keys: list[Swept] = Field(min_length=1, description="Keys, each with its distribution.")

    @property
    def combinations(self) -> int | None:
        """Number of combinations of values; None if a key has a continuous range."""
        values = [key.values for key in self.keys]
        return None if None in values else prod(len(each) for each in values if each is not None)

    @property
    def most_trials(self) -> int:
        """Number of trials: no combination of values is tried twice."""
        return min(self.trials, self.combinations or self.trials)

    @property
    def chosen_sampler(self) -> Literal["grid", "tpe", "random"]:
        """The sampler, or the default for these keys."""
        if self.sampler is not None:
            return self.sampler
        return "grid" if self.combinations is not None and self.combinations <= self.trials else "tpe"

    @property
    def maximizes(self) -> bool:
        """Whether a high goal is better."""
        if self.direction is not None:
            return self.direction == "maximize"
        metric = (self.goal or "loss").rpartition("/")[2]
        return not metric.endswith(LOWER_IS_BETTER)

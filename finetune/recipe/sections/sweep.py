"""Section `sweep`: keys of the recipe that `ft sweep` tries other values of. Training itself does not read it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetune.recipe.sections.section import OnResume, Section


class SweptKey(Section):
    """What every swept key has: the key, by which one draw is told from another."""

    on_resume: ClassVar[OnResume] = OnResume.MAY_CHANGE
    key: str = Field(min_length=1, description="Dotted path of a key of the recipe, such as optimizer.learning_rate.")
    draw: str

    def holds(self, value: Any) -> bool:
        """Whether a value is one that could be drawn."""
        raise NotImplementedError


class Numbers(SweptKey):
    """A range of numbers, both ends included."""

    low: float = Field(description="Smallest value.")
    high: float = Field(description="Largest value.")

    def holds(self, value: Any) -> bool:
        """Whether a number lies in the range."""
        return isinstance(value, int | float) and self.low <= value <= self.high


class Uniform(Numbers):
    """A number between two others."""

    draw: Literal["uniform"]


class LogUniform(Numbers):
    """A number whose logarithm is drawn evenly, as is usual for learning rates."""

    draw: Literal["log_uniform"]
    low: float = Field(gt=0, description="Smallest value.")


class Integer(Numbers):
    """A whole number."""

    draw: Literal["integer"]
    low: int = Field(description="Smallest value.")
    high: int = Field(description="Largest value.")
    step: int = Field(1, ge=1, description="Distance of the values that can be drawn, from low on.")

    def holds(self, value: Any) -> bool:
        """Whether a number is one of the steps."""
        return isinstance(value, int) and super().holds(value) and (value - self.low) % self.step == 0


class Choice(SweptKey):
    """One of several values."""

    draw: Literal["choice"]
    choices: list[bool | int | float | str] = Field(min_length=1, description="Values: numbers, words, true or false.")

    def holds(self, value: Any) -> bool:
        """Whether it is among the choices."""
        return value in self.choices


Swept = Annotated[Uniform | LogUniform | Integer | Choice, Field(discriminator="draw")]


class Sweep(Section):
    """What `ft sweep` tries: trials are runs that differ in these keys; the one with the lowest held-out loss wins."""

    on_resume: ClassVar[OnResume] = OnResume.MAY_CHANGE
    trials: int = Field(16, ge=1, description="Runs, that with the recipe's own values included.")
    sampler: Literal["tpe", "random"] = Field(
        "tpe", description="tpe: where good trials were, after some that are drawn at random (arXiv 2304.11127)."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the draw.")
    keys: list[Swept] = Field(min_length=1, description="Keys, and what is tried for each.")

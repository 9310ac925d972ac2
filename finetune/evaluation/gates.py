"""Conditions on results, such as `exact_match>=0.8`. Parsed without torch, so that a typo is reported at once."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.errors import UsageError
from finetune.recipe.sections.evaluation import current_task_name

_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_GATE = re.compile(r"\s*(?P<measured>[^<>=]*?)\s*(?P<sign>>=|<=|>|<)\s*(?P<bound>\S+)\s*")
_HINT = "write a metric, >=, >, <= or <, and a number: --gate 'exact_match>=0.8', or 'validation/exact_match>=0.8'"


@dataclass(frozen=True)
class Gate:
    """A condition.

    Attributes:
        text: The condition as given.
        measured: Metric, or task/metric.
        sign: The comparison of value and bound.
        bound: A number.
    """

    text: str
    measured: str
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Parse a condition.

        Raises:
            UsageError: The text is not a condition.
        """
        match = _GATE.fullmatch(text)
        if match is None or not match["measured"]:
            raise UsageError("this is not a condition", where=f"--gate {text}", hint=_HINT)
        try:
            bound = float(match["bound"])
        except ValueError:
            bound = math.nan
        if not math.isfinite(bound):
            found = match["bound"]
            percent = f"; {found} is {float(found[:-1]) / 100:g}" if re.fullmatch(r"\d+(\.\d*)?%", found) else ""
            raise UsageError(f"{found!r} is not a number", where=f"--gate {text}", hint=_HINT + percent)
        task, slash, metric = match["measured"].partition("/")
        measured = f"{current_task_name(task)}/{metric}" if slash else task
        return cls(text.strip(), measured, match["sign"], bound)

    def matching(self, names: Sequence[str]) -> list[str]:
        """The names (task/metric) that the condition applies to. A metric without a task applies to all tasks.

        Raises:
            UsageError: No name matches.
        """
        found = [name for name in names if name == self.measured or name.partition("/")[2] == self.measured]
        if not found:
            raise UsageError(
                f"{self.measured!r} is not measured",
                where=f"--gate {self.text}",
                hint=f"measured: {', '.join(names)}",
            )
        return found

    def holds(self, value: float) -> bool:
        """Whether a value meets the condition. NaN meets none."""
        return bool(_OPERATORS[self.sign](value, self.bound))

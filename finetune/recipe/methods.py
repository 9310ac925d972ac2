"""The table of `ft methods`: all adapters and quantizations, described by their sections."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from finetune.recipe.sections.adapter import Adapter
from finetune.recipe.sections.quantization import Quantization


@dataclass(frozen=True)
class Choice:
    """One adapter method or kind of quantization.

    Attributes:
        key: `adapter.method` or `quantization.kind`.
        name: Value of the key.
        what: Description in one sentence.
        source: Authors, year and paper; empty if there is none.
        costs: Trainable parameters, or bits per weight.
        merges: Result of a merge.
        loads_in: Programs that load the result.
    """

    key: str
    name: str
    what: str
    source: str
    costs: str
    merges: str
    loads_in: str


def method_table() -> list[Choice]:
    """All choices, adapters first, in the order of the schema."""
    return [*_choices("adapter.method", Adapter), *_choices("quantization.kind", Quantization)]


def _choices(key: str, union: Any) -> Iterator[Choice]:
    tag = key.rpartition(".")[2]
    for section in get_args(get_args(union)[0]):
        first_line = section.__doc__.splitlines()[0]
        what, source = re.fullmatch(r"(.*?)(?: \(([^()]*\d{4}[^()]*)\))?\.", first_line).groups()  # type: ignore[union-attr]
        for name in get_args(section.model_fields[tag].annotation):
            yield Choice(key, name, what, source or "", section.costs, section.merges, section.loads_in)

"""Options of readers."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.recipe.sections.data import Delimiter, TextSplit


@dataclass(frozen=True)
class Options:
    """Options of a source for reading its files.

    Attributes:
        delimiter: Delimiter of CSV cells; None to detect it from the header.
        split: Unit of plain text that makes a row; None where a source cannot use plain text.
    """

    delimiter: Delimiter | None = None
    split: TextSplit | None = None

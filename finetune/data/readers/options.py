"""What a source may say about its files."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.recipe.sections.data import Delimiter, TextSplit


@dataclass(frozen=True)
class Options:
    """How files are read where their kind leaves a choice.

    Attributes:
        delimiter: What separates the cells of a CSV file; None to see it from the header.
        split: What of a plain text file is a row; None where a source cannot use plain text.
    """

    delimiter: Delimiter | None = None
    split: TextSplit | None = None

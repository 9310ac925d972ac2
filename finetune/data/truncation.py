"""Rows on their way from documents to examples of at most `max_length`, with a count of every loss."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from finetune.data.documents import Conversation, Document, PlainText, Tokens
from finetune.data.encode import Encoder, Example
from finetune.data.lengths import chunks, without_end, without_prompt_head
from finetune.data.token_store import Encoded, RowCounts
from finetune.errors import DataError
from finetune.recipe.sections.data import Data


class Truncation:
    """Collects some rows of a source as a store keeps them.

    Args:
        encoder: Makes tokens of documents.
        section: Says what to do with rows that are too long.
    """

    def __init__(self, encoder: Encoder, section: Data) -> None:
        self._encoder = encoder
        self._section = section
        self._examples: list[Example] = []
        self._rows: list[int] = []
        self._places: list[str] = []
        self._too_long: list[str] = []
        self._untrainable: list[str] = []
        self._read = 0
        self._truncated = 0
        self._cut_targets = 0

    def add(self, document: Document, row: int, where: str) -> None:
        """Encode a row's document, make it fit, and keep what trains something.

        Args:
            document: What the row holds.
            row: Its number in the source, from 0.
            where: Its place, for messages.

        Raises:
            DataError: It is too long and the recipe does not say what to do, or it cannot be encoded.
        """
        self._read += 1
        splits = self._section.split_turns and isinstance(document, Conversation)
        for part in document.split_turns() if splits and isinstance(document, Conversation) else [document]:
            whole = self._encoder.example(part, where)
            for example in self._fit(whole, part, where):
                if not example.targets:
                    self._untrainable.append(where)
                    continue
                self._examples.append(example)
                self._rows.append(row)
                self._places.append(where)
                self._truncated += self._section.overlength != "split" and example is not whole

    def encoded(self) -> Encoded:
        """All that was added."""
        examples = self._examples
        lengths = np.array([len(example.ids) for example in examples], np.int64)
        targets = np.array([example.targets for example in examples], np.int64)
        ids = np.array([token for example in examples for token in example.ids], np.uint32)
        trained = np.array([mark for example in examples for mark in example.is_target], np.uint32)
        counts = RowCounts(
            read=self._read,
            added=len(examples) + len(self._too_long) + len(self._untrainable) - self._read,
            kept=len(examples),
            too_long=len(self._too_long),
            untrainable=len(self._untrainable),
            truncated=self._truncated,
            tokens=int(lengths.sum()),
            target_tokens=int(targets.sum()),
            cut_target_tokens=self._cut_targets,
        )
        columns = {
            "tokens": ids << 1 | trained,
            "targets": targets,
            "rows": np.array(self._rows, np.int64),
            "digests": _digests(ids, lengths),
        }
        remarks = sorted(self._encoder.remarks)
        return Encoded(columns, lengths, self._places, counts, self._too_long, self._untrainable, remarks)

    def _fit(self, example: Example, document: Document, where: str) -> list[Example]:
        longest, policy = self._section.max_length, self._section.overlength
        if len(example.ids) <= longest:
            return [example]
        if policy == "drop":
            self._too_long.append(where)
            return []
        if policy == "truncate":
            cut = without_end(example, longest)
            self._cut_targets += example.targets - cut.targets
            return [cut]
        if policy == "split" and _is_without_prompt(document):
            return chunks(example, longest)
        if policy == "truncate_prompt":
            fitted = without_prompt_head(example, longest, self._encoder.head(document, example, where))
            if fitted is not None:
                return [fitted]
        raise self._too_long_error(example, where)

    def _too_long_error(self, example: Example, where: str) -> DataError:
        reasons = {
            "truncate_prompt": ", and what follows the first trained token leaves no room for a prompt",
            "split": ", and a row with a prompt cannot be split: its later parts would lack what they answer",
        }
        return DataError(
            f"the row has {len(example.ids)} tokens, more than data.max_length: {self._section.max_length}"
            + reasons.get(self._section.overlength, ""),
            where=where,
            hint="raise data.max_length, shorten the row, or set data.overlength to drop",
        )


def _is_without_prompt(document: Document) -> bool:
    return isinstance(document, Tokens) or (isinstance(document, PlainText) and not document.prompt)


def _digests(ids: np.ndarray, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """64 bits of each example's tokens: equal for equal rows, and for others but once in 2^64 pairs."""
    parts = np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []
    hashed = b"".join(hashlib.blake2b(part.tobytes(), digest_size=8).digest() for part in parts)
    return np.frombuffer(hashed, np.uint64)

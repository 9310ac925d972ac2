"""Rows as examples of at most `max_length` tokens: cut, split or dropped as the recipe says, and every loss counted."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from finetune.data.bad_rows import MALFORMED, WITHOUT_TARGETS, BadRows, merged
from finetune.data.documents import Conversation, Document, PlainText, Tokens, prompt_of
from finetune.data.encode import Encoder, Example
from finetune.data.token_store import EncodedRows, RowCounts
from finetune.errors import BadRow, DataError
from finetune.recipe.sections.data import Data

_NO_TARGETS = DataError("the row has no target tokens", hint="give it an answer, or remove it")


class Truncation:
    """Collects rows of a source in the form that a token store keeps.

    Args:
        encoder: Tokenizes documents.
        section: Maximum length, and the policy for longer rows.
    """

    def __init__(self, encoder: Encoder, section: Data) -> None:
        self._encoder = encoder
        self._section = section
        self._examples: list[Example] = []
        self._rows: list[int] = []
        self._prompts: list[int] = []
        self._places: list[str] = []
        self._too_long: list[str] = []
        self._bad: dict[str, BadRows] = {}
        self._bad_counts: Counter[str] = Counter()
        self._read = 0
        self._truncated = 0
        self._cut_targets = 0

    def add(self, document: Document, row: int, where: str) -> None:
        """Encode the document of a row, shorten it, and keep its examples that have target tokens.

        A row that cannot be used is counted under its reason, and none of its examples is kept.

        Args:
            document: The row's content.
            row: Index of the row in its source.
            where: Place of the row, for messages.

        Raises:
            DataError: The row is too long and no policy applies.
        """
        try:
            encoded = self._encoded(document, where)
        except BadRow as error:
            self.add_bad(error, where)
            return
        self._read += 1
        prompt = _prompt_digest(document)
        for part, full in encoded:
            for example in self._shortened(full, part, where):
                # Tested after the cut: a cut at the end can remove all targets.
                if not example.targets:
                    self._count_bad(WITHOUT_TARGETS, _NO_TARGETS, where)
                    continue
                self._examples.append(example)
                self._rows.append(row)
                self._prompts.append(prompt)
                self._places.append(where)
                # Splitting loses no token, so its parts do not count as cut.
                self._truncated += self._section.overlength != "split" and example is not full

    def _encoded(self, document: Document, where: str) -> list[tuple[Document, Example]]:
        if isinstance(document, Conversation) and document.has_greeting and self._section.train_on == "assistant":
            self._encoder.report.note("a greeting before the first user message is context and no target", where)
        splits = self._section.split_turns and isinstance(document, Conversation)
        parts = document.split_turns() if splits and isinstance(document, Conversation) else [document]
        return [(part, example) for part in parts for example in self._encoder.examples(part, where)]

    def add_bad(self, error: DataError, where: str) -> None:
        """Count a row that cannot be used, under the error's reason or as malformed."""
        self._read += 1
        self._count_bad(error.reason if isinstance(error, BadRow) else MALFORMED, error, where)

    def _count_bad(self, reason: str, error: DataError, where: str) -> None:
        self._bad = merged(self._bad, {reason: BadRows(error.what, error.hint, [where])})
        self._bad_counts[reason] += 1

    def encoded(self) -> EncodedRows:
        """All rows that were added, as columns."""
        examples = self._examples
        lengths = np.array([len(example.ids) for example in examples], np.int64)
        targets = np.array([example.targets for example in examples], np.int64)
        ids = np.array([token for example in examples for token in example.ids], np.uint32)
        is_target = np.array([mark for example in examples for mark in example.is_target], np.uint32)
        counts = RowCounts(
            read=self._read,
            added=len(examples) + len(self._too_long) + self._bad_counts.total() - self._read,
            kept=len(examples),
            too_long=len(self._too_long),
            bad=self._bad_counts,
            truncated=self._truncated,
            tokens=int(lengths.sum()),
            target_tokens=int(targets.sum()),
            cut_target_tokens=self._cut_targets,
        )
        columns = {
            "tokens": ids << 1 | is_target,
            "targets": targets,
            "rows": np.array(self._rows, np.int64),
            "digests": _digests(ids, lengths),
            "prompts": np.array(self._prompts, np.uint64),
        }
        return EncodedRows(columns, lengths, self._places, counts, self._too_long, self._bad, self._encoder.report)

    def _shortened(self, example: Example, document: Document, where: str) -> list[Example]:
        longest, policy = self._section.max_length, self._section.overlength
        if len(example.ids) <= longest:
            return [example]
        if policy == "drop":
            self._too_long.append(where)
            return []
        if policy == "truncate":
            cut = cut_end(example, longest)
            self._cut_targets += example.targets - cut.targets
            return [cut]
        if policy == "split" and _is_without_prompt(document):
            return chunks(example, longest)
        if policy == "truncate_prompt":
            shortened = cut_prompt(example, longest, self._encoder.protected_prefix(document, example, where))
            if shortened is not None:
                return [shortened]
        raise self._too_long_error(example, document, where)

    def _too_long_error(self, example: Example, document: Document, where: str) -> DataError:
        reasons = {
            "truncate_prompt": ", and the tokens from the first target on leave no room for a prompt",
            "split": ", and a row with a prompt cannot be split: its later parts would have no prompt",
        }
        has_answers = isinstance(document, Conversation) and len(document.answers) > 1 and not self._section.split_turns
        per_answer = (
            "set data.split_turns to true or data.train_on to last_turn, so that one answer has a long prompt; or "
        )
        return DataError(
            f"the row has {len(example.ids)} tokens, more than data.max_length: {self._section.max_length}"
            + reasons.get(self._section.overlength, ""),
            where=where,
            hint=(per_answer if has_answers and self._section.overlength == "truncate_prompt" else "")
            + "raise data.max_length, shorten the row, or set data.overlength to drop",
        )


def cut_prompt(example: Example, longest: int, protected: int) -> Example | None:
    """Remove prompt tokens after the protected prefix; no target is removed.

    Args:
        example: A row of more than `longest` tokens.
        longest: Maximum number of tokens.
        protected: Number of tokens at the beginning that stay.

    Returns:
        The row with `longest` tokens; None where the prompt is too short for that.
    """
    prompt = example.is_target.index(True) if any(example.is_target) else len(example.ids)
    cut = len(example.ids) - longest
    if cut >= prompt - protected:  # one prompt token must remain: the first target is predicted from it
        return None
    resumes = protected + cut
    return Example(
        example.ids[:protected] + example.ids[resumes:], example.is_target[:protected] + example.is_target[resumes:]
    )


def cut_end(example: Example, longest: int) -> Example:
    """Remove all tokens after the first `longest`, targets included."""
    return Example(example.ids[:longest], example.is_target[:longest])


def chunks(example: Example, longest: int) -> list[Example]:
    """Split a row into examples of at most `longest` tokens; each begins with the last token of the one before.

    The first target of a chunk is predicted from that repeated token, so that every target is trained exactly once.
    """
    starts = range(0, max(1, len(example.ids) - 1), longest - 1)
    return [_chunk(example, start, start + longest) for start in starts]


def _chunk(example: Example, start: int, stop: int) -> Example:
    return Example(example.ids[start:stop], [False, *example.is_target[start + 1 : stop]])


def _is_without_prompt(document: Document) -> bool:
    return isinstance(document, Tokens) or (isinstance(document, PlainText) and not document.prompt)


def _prompt_digest(document: Document) -> int:
    """A 64-bit BLAKE2b hash of the prompt of a row; 0 for a row without one."""
    prompt = prompt_of(document)
    if prompt is None:
        return 0
    text = prompt.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _digests(ids: np.ndarray, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """A 64-bit BLAKE2b hash of each example's token ids, shape (examples,), uint64."""
    parts = np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []
    hashed = b"".join(hashlib.blake2b(part.tobytes(), digest_size=8).digest() for part in parts)
    return np.frombuffer(hashed, np.uint64)

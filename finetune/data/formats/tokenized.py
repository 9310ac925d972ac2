"""Tokenized: rows of token ids from another program."""

from __future__ import annotations

from finetune.data.collate import IGNORED
from finetune.data.documents import Format, Tokens
from finetune.data.json_text import structured
from finetune.data.rows import Row, describe
from finetune.errors import DataError
from finetune.recipe.sections.data import TokenizedSource


class TokenizedFormat(Format[TokenizedSource]):
    """Rows of token ids with optional labels or a mask."""

    def document(self, row: Row) -> Tokens:
        """The token ids of the row; refuses a label that is neither its own token nor -100."""
        section = self.section
        ids = _integers(row, section.input_ids)
        if any(token < 0 for token in ids):
            raise DataError(
                f"column {section.input_ids!r} has a token below 0", where=row.where, hint="correct the row"
            )
        has_labels, has_mask = (row.values.get(column) not in (None, "") for column in (section.labels, section.mask))
        if has_labels and has_mask:
            raise DataError(
                f"the row has both {section.labels!r} and {section.mask!r}", where=row.where, hint="remove one of them"
            )
        if has_labels:
            return Tokens(ids, self._labelled(row, ids))
        if has_mask:
            return Tokens(ids, self._masked(row, ids))
        return Tokens(ids, (True,) * len(ids))

    def _labelled(self, row: Row, ids: tuple[int, ...]) -> tuple[bool, ...]:
        labels = _integers(row, self.section.labels, len(ids))
        for index, (token, label) in enumerate(zip(ids, labels, strict=True)):
            if label not in (token, IGNORED):
                raise DataError(
                    f"label {index} is {label}, but its token is {token}",
                    where=row.where,
                    hint="a label is at the position of its token, not shifted, and -100 where the token is no target",
                )
        return tuple(label != IGNORED for label in labels)

    def _masked(self, row: Row, ids: tuple[int, ...]) -> tuple[bool, ...]:
        mask = _integers(row, self.section.mask, len(ids))
        if not set(mask) <= {0, 1}:
            raise DataError(
                f"column {self.section.mask!r} must contain only 0 and 1", where=row.where, hint="correct the row"
            )
        return tuple(bool(value) for value in mask)


def _integers(row: Row, column: str, length: int | None = None) -> tuple[int, ...]:
    values = structured(row, column)
    if not isinstance(values, list) or not values or any(type(value) is not int for value in values):
        raise DataError(
            f"column {column!r} must be a list of whole numbers, found {describe(values)}",
            where=row.where,
            hint="correct the row, or set the name of its column in the source's section of the recipe",
        )
    if length is not None and len(values) != length:
        raise DataError(
            f"column {column!r} has {len(values)} values for {length} tokens", where=row.where, hint="correct the row"
        )
    return tuple(values)

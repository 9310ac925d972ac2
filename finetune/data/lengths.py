"""Rows that are longer than the recipe allows, made to fit. None of these removes a target unless its name says so."""

from __future__ import annotations

from finetune.data.encode import Example


def without_prompt_head(example: Example, longest: int, head: int) -> Example | None:
    """Cut tokens behind the head and before the first target; None where that does not suffice.

    Args:
        example: The row.
        longest: Tokens that may remain.
        head: Tokens at its beginning that stay.
    """
    prompt = example.is_target.index(True) if any(example.is_target) else len(example.ids)
    cut = len(example.ids) - longest
    if cut >= prompt - head:  # a first target needs a token to be predicted from
        return None
    return Example(
        example.ids[:head] + example.ids[head + cut :], example.is_target[:head] + example.is_target[head + cut :]
    )


def without_end(example: Example, longest: int) -> Example:
    """Cut the end, targets included."""
    return Example(example.ids[:longest], example.is_target[:longest])


def chunks(example: Example, longest: int) -> list[Example]:
    """Rows that follow each other in the text, each begun by the last token of the one before.

    The shared token is what the first target of a row is predicted from, so that every target is trained once.
    """
    starts = range(0, max(1, len(example.ids) - 1), longest - 1)
    return [_chunk(example, start, start + longest) for start in starts]


def _chunk(example: Example, start: int, stop: int) -> Example:
    return Example(example.ids[start:stop], [False, *example.is_target[start + 1 : stop]])

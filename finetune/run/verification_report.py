"""`merge.json` and `export.json`: the verification reports that `ft merge` and `ft export` write beside a model."""

from __future__ import annotations

from pathlib import Path

from typing_extensions import TypedDict

from finetune.storage.records import Count, Flag, Number, read_record, with_other_keys


@with_other_keys
class Fingerprinted(TypedDict, total=False):
    """A base or an adapter."""

    fingerprint: str


_Earlier = TypedDict("_Earlier", {"in_conversation": Flag}, total=False)  # noqa: UP013
"""Keys of earlier versions."""


@with_other_keys
class VerificationReport(_Earlier, total=False):
    """A verification report, and the facts of the training with which the model is asked."""

    kl_divergence: Number
    top1_agreement: Number
    relative_difference: Number
    bound: Number
    positions: Count
    rows: Count
    dtype: str
    type: str
    format: str
    base: Fingerprinted
    adapter: Fingerprinted
    uses_chat_template: Flag
    answer_ends: list[Count]
    today: str | None


AGREEMENT = frozenset({"kl_divergence", "top1_agreement", "relative_difference", "bound"})
"""Keys of the comparison of logits."""


def read_verification_report(file: Path) -> VerificationReport:
    """The report, as far as it is recorded and undamaged."""
    return read_record(file, VerificationReport)

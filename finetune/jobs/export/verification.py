"""Verification of a written model: its logits on real rows, compared with the logits of the trained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from finetune.data.encode import Example
from finetune.errors import RefusedError
from finetune.evaluation.agreement import Agreement, logits_of
from finetune.jobs.load.trained_run import FineTunedRun
from finetune.models.loading.layerwise import StreamedModel
from finetune.models.loading.model_files import ModelFolder
from finetune.quantizers.choice import Quantizers
from finetune.recipe.sections.quantization import NoQuantization
from finetune.run.events import EventHandler

QUANTIZED = "quantized"
"""In the place of a dtype: the base's own codes and scales, with changed minimums."""

BOUNDS = {QUANTIZED: 2e-5, "float32": 2e-5, "float16": 1e-2, "bfloat16": 8e-2}
"""Largest difference of two logits, as a fraction of the largest logit, that rounding weights to a dtype explains."""

VERIFICATION_TOKENS = 512
"""Tokens of the compared batch, padding included."""

ROW_TOKENS = 256
"""Most tokens of a compared row."""


@dataclass(frozen=True)
class Verification:
    """Rows on which two models are compared.

    Attributes:
        held_out: Whether they are validation rows.
        rows: The rows.
    """

    held_out: bool
    rows: list[Example]


class Verified(Protocol):
    """A written model and its agreement with the trained one."""

    @property
    def folder(self) -> Path:
        """Its folder."""

    @property
    def bound(self) -> float:
        """The largest allowed `agreement.relative_difference`."""

    @property
    def agreement(self) -> Agreement:
        """Its logits compared with the trained model's."""


def check_agreement(result: Verified, dtype: str, hint: str = "choose a wider --dtype") -> None:
    """Check that a written model agrees with the trained one.

    Raises:
        RefusedError: The logits differ by more than the bound.
    """
    difference = result.agreement.relative_difference
    if not difference <= result.bound:  # not `>`: NaN must be refused too
        raise RefusedError(
            f"written and trained logits differ by {difference:.2g} of the largest logit, more than the "
            f"{result.bound:.0e} that rounding to {dtype} explains",
            where=str(result.folder),
            hint=hint,
        )


def verification_rows(trained: FineTunedRun, on_event: EventHandler) -> Verification:
    """Validation rows if there are any, else training rows, as many as fill a batch of VERIFICATION_TOKENS."""
    datasets = trained.context.read_data(on_event)
    held_out = len(datasets.validation) > 0
    rows: list[Example] = []
    longest = 0
    for example in datasets.validation if held_out else datasets.train:
        cut = Example(example.ids[:ROW_TOKENS], example.is_target[:ROW_TOKENS])
        longest = max(longest, len(cut.ids))
        if (len(rows) + 1) * longest > VERIFICATION_TOKENS:
            break
        rows.append(cut)
    return Verification(held_out, rows)


def streamed_logits(streamed: StreamedModel, model: nn.Module, examples: Sequence[Example]) -> list[Tensor]:
    """`logits_of` a model over a base whose layers are loaded one at a time."""
    with streamed.streaming():
        logits = logits_of(model, examples)
    # Weights that no hook has loaded are NaN: in some architectures a layer reads the weights of another one. They need
    # all weights in memory.
    if all(logits_KV.isfinite().all() for logits_KV in logits):
        return logits
    with streamed.filled():
        return logits_of(model, examples)


def written_logits(trained: FineTunedRun, folder: Path, examples: Sequence[Example]) -> list[Tensor]:
    """Logits in float32 of a model that was written from a run, read back from disk."""
    context = trained.context
    written = StreamedModel(
        ModelFolder(folder, str(folder)),
        context.section,
        Quantizers(NoQuantization()),
        context.accelerator.device,
        dequantized=False,
    )
    return streamed_logits(written, written.model, examples)

"""`ft merge`: trained weights folded into the base's, proved on real rows."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetune.data.encode import Example
from finetune.errors import RefusedError
from finetune.evaluation.agreement import Agreement, agreement, logits_of
from finetune.jobs.trained import TrainedRun
from finetune.models.linears import dequantize_model, rounds_activations
from finetune.models.precision import DTYPES
from finetune.run.directory import RunDirectory, write_json, written_aside
from finetune.run.events import Phase, Report, ignore

BOUNDS = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 8e-2}
"""Largest difference of two logits, as a share of the largest logit, that rounding weights to a dtype explains."""

PROOF_TOKENS = 512
"""Tokens of real rows on which merged and unmerged logits are compared."""


@dataclass(frozen=True)
class MergeResult:
    """Where the merged model is, and the proof that it is the trained one.

    Attributes:
        folder: A model folder that plain transformers loads.
        dtype: Of its weights.
        bound: What `agreement.relative_difference` had to stay below.
        agreement: Merged logits, read back from disk, against base-plus-adapter logits, both in float32.
    """

    folder: Path
    dtype: str
    bound: float
    agreement: Agreement

    def to_json(self) -> dict[str, Any]:
        """The certificate that stands in `merge.json`."""
        numbers = {**asdict(self.agreement), "relative_difference": self.agreement.relative_difference}
        return {"dtype": self.dtype, "bound": self.bound, **numbers}


def merge(
    run: RunDirectory,
    output: Path | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    report: Report = ignore,
) -> MergeResult:
    """Write the run's model without its adapter, in full precision.

    The base of the merge is what the adapter was trained on: for a quantized base, its dequantized weights.

    Args:
        run: A finished run.
        output: Folder to write, by default the run's `merged/`.
        dtype: Of the written weights.
        overwrite: Replace a folder that is there.
        report: Told of every phase.

    Raises:
        RefusedError: The base is another one, the folder is taken, or the merged model does not agree with
            the trained one; then nothing is written.
        UnsupportedError: What the run trains has no form without an adapter.
    """
    target = (output or run.merged).absolute()
    if target.exists() and not overwrite:
        raise RefusedError("the folder is there already", where=str(target), hint="choose --output, or add --overwrite")
    trained = TrainedRun.open(run, report)
    trained.bench.method.check_merge()
    examples = proof_rows(trained, report)
    report(Phase("computing the trained model's logits"))
    reference = trained_logits(trained, examples, report)
    gc.collect()
    with written_aside(target) as folder:
        report(Phase(f"merging in {dtype}"))
        _write_merged(trained, folder, DTYPES[dtype], report)
        gc.collect()
        report(Phase("comparing merged and trained logits"))
        reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        result = MergeResult(target, dtype, BOUNDS[dtype], agreement(reference, logits_of(reloaded, examples)))
        if not result.agreement.relative_difference <= result.bound:
            raise RefusedError(
                f"merged and trained logits differ by {result.agreement.relative_difference:.2g} of the largest logit, "
                f"more than the {result.bound:.0e} that rounding to {dtype} explains",
                where=str(target),
                hint="choose a wider --dtype",
            )
        write_json(folder / "merge.json", result.to_json())
    return result


def proof_rows(trained: TrainedRun, report: Report) -> list[Example]:
    """Real rows, held-out ones if there are any, up to PROOF_TOKENS tokens together."""
    split = trained.bench.read_data(report)
    rows: list[Example] = []
    room = PROOF_TOKENS
    for example in split.validation or split.train:
        cut = example.ids[:room]
        rows.append(Example(cut, example.is_target[:room]))
        room -= len(cut)
        if not room:
            break
    return rows


def trained_logits(trained: TrainedRun, examples: Sequence[Example], report: Report) -> list[Tensor]:
    """Logits of base plus trained weights in float32, as they were trained.

    A quantizer that rounds inputs too adds noise that no merge can reproduce: there the base is dequantized.
    """
    bench = trained.bench
    base = bench.load_base(report, torch.float32)
    if rounds_activations(base):
        base = dequantize_model(base, torch.float32)
    return logits_of(trained.attach(base, report), examples)


def _write_merged(trained: TrainedRun, folder: Path, dtype: torch.dtype, report: Report) -> None:
    bench = trained.bench
    base = dequantize_model(bench.load_base(report, torch.float32), torch.float32)
    merged = bench.method.merge(trained.attach(base, report)).to(dtype)
    assert isinstance(merged, PreTrainedModel)
    merged.config.dtype = dtype
    merged.save_pretrained(folder)
    bench.tokenizer.save_pretrained(folder)

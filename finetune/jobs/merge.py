"""`ft merge`: trained weights folded into the base's, proved on real rows."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from finetune.data.encode import Example
from finetune.errors import RefusedError
from finetune.evaluation.agreement import Agreement, agreement, logits_of
from finetune.jobs.trained import TrainedRun
from finetune.models.folder import ModelFolder
from finetune.models.linears import dequantize_model, rounds_activations
from finetune.models.load import load_model
from finetune.models.precision import DTYPES
from finetune.models.quantized import save_quantized
from finetune.quantizers.choice import Quantizers
from finetune.recipe.quantization import NoQuantization
from finetune.run.directory import RunDirectory, write_json, written_aside
from finetune.run.events import Phase, Report, ignore

QUANTIZED = "quantized"
"""In the place of a dtype: the base's own codes and scales, its minimums moved."""

BOUNDS = {QUANTIZED: 2e-5, "float32": 2e-5, "float16": 1e-2, "bfloat16": 8e-2}
"""Largest difference of two logits, as a share of the largest logit, that rounding weights to a dtype explains."""

PROOF_TOKENS = 512
"""Tokens of real rows on which merged and unmerged logits are compared."""


@dataclass(frozen=True)
class MergeResult:
    """Where the merged model is, and the proof that it is the trained one.

    Attributes:
        folder: A model folder: one that plain transformers loads, or of quantized weights.
        dtype: Of its weights, or QUANTIZED.
        in_conversation: Whether the run was trained through the chat template.
        bound: What `agreement.relative_difference` had to stay below.
        agreement: Merged logits, read back from disk, against base-plus-adapter logits, both in float32.
    """

    folder: Path
    dtype: str
    in_conversation: bool
    bound: float
    agreement: Agreement

    def to_json(self) -> dict[str, Any]:
        """The certificate that stands in `merge.json`."""
        numbers = {**asdict(self.agreement), "relative_difference": self.agreement.relative_difference}
        return {"dtype": self.dtype, "in_conversation": self.in_conversation, "bound": self.bound, **numbers}


def merge(
    run: RunDirectory,
    output: Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    report: Report = ignore,
) -> MergeResult:
    """Write the run's model without its adapter.

    The base of the merge is what the adapter was trained on: for a quantized base, its dequantized weights, or the
    quantized weights themselves.

    Args:
        run: A finished run.
        output: Folder to write, by default the run's `merged/`.
        dtype: Of the written weights; QUANTIZED keeps the base's codes. By default QUANTIZED where the method merges
            without loss into quantized weights, and else float32.
        overwrite: Replace a folder that is there.
        report: Told of every phase.

    Raises:
        UnsupportedError: The method does not merge, or not into quantized weights, or there are none.
        RefusedError: The base is another one, the folder is taken, or the merged model does not agree with
            the trained one; then nothing is written.
    """
    target = (output or run.merged).absolute()
    refuse_taken(target, overwrite)
    trained = TrainedRun.open(run, report)
    trained.bench.method.check_merge()
    dtype = dtype or (QUANTIZED if trained.bench.method.fits_quantized else "float32")
    examples = proof_rows(trained, report)
    report(Phase("computing the trained model's logits"))
    reference = trained_logits(trained, examples, report)
    gc.collect()
    with written_aside(target) as folder:
        if dtype == QUANTIZED:
            report(Phase("merging into the quantized weights"))
            _write_quantized(trained, folder, report)
        else:
            report(Phase(f"merging in {dtype}"))
            _write_merged(trained, folder, DTYPES[dtype], report)
        gc.collect()
        report(Phase("comparing merged and trained logits"))
        reloaded = _reload(trained, folder, dtype)
        agrees = agreement(reference, logits_of(reloaded, examples))
        result = MergeResult(target, dtype, trained.record.in_conversation, BOUNDS[dtype], agrees)
        if not result.agreement.relative_difference <= result.bound:
            raise RefusedError(
                f"merged and trained logits differ by {result.agreement.relative_difference:.2g} of the largest logit, "
                f"more than the {result.bound:.0e} that rounding to {dtype} explains",
                where=str(target),
                hint="choose a wider --dtype",
            )
        write_json(folder / "merge.json", result.to_json())
    return result


def refuse_taken(target: Path, overwrite: bool) -> None:
    """Refuse to write where something is, unless that was asked for.

    Raises:
        RefusedError: The folder is there.
    """
    if target.exists() and not overwrite:
        raise RefusedError("the folder is there already", where=str(target), hint="choose --output, or add --overwrite")


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
    base = trained.load_base(report, torch.float32)
    if rounds_activations(base):
        base = dequantize_model(base, torch.float32)
    return logits_of(trained.attach(base, report), examples)


def _write_merged(trained: TrainedRun, folder: Path, dtype: torch.dtype, report: Report) -> None:
    bench = trained.bench
    base = dequantize_model(trained.load_base(report, torch.float32), torch.float32)
    merged = bench.method.merge(base, trained.weights).to(dtype)
    merged.config.dtype = dtype
    merged.save_pretrained(folder)
    bench.tokenizer.save_pretrained(folder)


def _write_quantized(trained: TrainedRun, folder: Path, report: Report) -> None:
    bench = trained.bench
    base = trained.load_base(report, torch.float32)
    save_quantized(bench.method.merge_quantized(base, trained.weights), folder)
    bench.tokenizer.save_pretrained(folder)


def _reload(trained: TrainedRun, folder: Path, dtype: str) -> nn.Module:
    """The written model in float32: by plain transformers if its weights are plain."""
    if dtype != QUANTIZED:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        return model
    bench = trained.bench
    reloaded: nn.Module = load_model(
        ModelFolder(folder, str(folder)),
        bench.recipe.model,
        Quantizers(NoQuantization()),
        weight_dtype=torch.float32,
        compute_dtype=torch.float32,
        device=bench.accelerator.device,
    )
    return reloaded

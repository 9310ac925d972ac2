"""`ft merge`: trained weights folded into the base's, proved on real rows.

Base, adapter and merged model are read and written a layer at a time, so that memory holds no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from finetune.adapters import peft_bridge
from finetune.data.encode import Example
from finetune.errors import RefusedError
from finetune.evaluation.agreement import Agreement, agreement, logits_of
from finetune.jobs.export.model_card import public_name, write_card
from finetune.jobs.load.trained_run import FineTunedRun
from finetune.models.fingerprint import fingerprint
from finetune.models.loading.dtype import DTYPES
from finetune.models.loading.layerwise import StreamedModel
from finetune.models.loading.model_files import ModelFolder
from finetune.models.writing.rewrite import write_merged, write_merged_quantized
from finetune.quantizers.choice import Quantizers
from finetune.recipe.sections.quantization import NoQuantization
from finetune.report.run_page import recording_errors
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler, Phase, ignore
from finetune.storage.files import write_json, written_aside

QUANTIZED = "quantized"
"""In the place of a dtype: the base's own codes and scales, its minimums moved."""

BOUNDS = {QUANTIZED: 2e-5, "float32": 2e-5, "float16": 1e-2, "bfloat16": 8e-2}
"""Largest difference of two logits, as a share of the largest logit, that rounding weights to a dtype explains."""

VERIFICATION_TOKENS = 512
"""Positions at which merged and unmerged logits are compared, padding included."""

ROW_TOKENS = 256
"""Most of one row that is compared."""


@dataclass(frozen=True)
class Verification:
    """Rows on which two models are compared.

    Attributes:
        held_out: Whether they were kept out of training.
        rows: The rows.
    """

    held_out: bool
    rows: list[Example]


@dataclass(frozen=True)
class MergeResult:
    """Where the merged model is, and the proof that it is the trained one.

    Attributes:
        folder: A model folder: one that plain transformers loads, or of quantized weights.
        dtype: Of its weights, or QUANTIZED.
        uses_chat_template: Whether the run was trained through the chat template.
        base: Name, commit and fingerprint of the base.
        adapter: Method and fingerprint of what was trained.
        held_out: Whether the compared rows were kept out of training.
        bound: What `agreement.relative_difference` had to stay below.
        agreement: Merged logits, read back from disk, against base-plus-adapter logits, both in float32.
    """

    folder: Path
    dtype: str
    uses_chat_template: bool
    base: dict[str, Any]
    adapter: dict[str, Any]
    held_out: bool
    bound: float
    agreement: Agreement

    def to_json(self) -> dict[str, Any]:
        """The certificate that stands in `merge.json`."""
        facts = {key: value for key, value in vars(self).items() if key not in ("folder", "agreement")}
        return {**facts, **asdict(self.agreement), "relative_difference": self.agreement.relative_difference}


def merge(
    run: RunDirectory,
    output: Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    on_event: EventHandler = ignore,
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
        on_event: Told of every phase.

    Raises:
        UnsupportedError: The method does not merge, or not into quantized weights, or there are none.
        RefusedError: The base is another one, the folder is taken, or the merged model does not agree with
            the trained one; then nothing is written.
    """
    target = (output or run.merged).absolute()
    refuse_taken(target, overwrite)
    trained = FineTunedRun.open(run, on_event)
    context = trained.context
    context.method.check_merge()
    dtype = dtype or (QUANTIZED if context.method.fits_quantized else "float32")
    proof = verification_rows(trained, on_event)
    reference = _trained_logits(trained, proof.rows, on_event)
    with recording_errors(run), written_aside(target) as folder:
        _write(trained, folder, dtype, on_event)
        on_event(Phase("comparing merged and trained logits"))
        result = MergeResult(
            folder=target,
            dtype=dtype,
            uses_chat_template=trained.record.uses_chat_template,
            base={**trained.record.base.model_dump(), "name": public_name(context.section)},
            adapter={"method": context.recipe.adapter.method, "fingerprint": fingerprint(trained.weights)},
            held_out=proof.held_out,
            bound=BOUNDS[dtype],
            agreement=agreement(reference, written_logits(trained, folder, proof.rows)),
        )
        if not result.agreement.relative_difference <= result.bound:
            raise RefusedError(
                f"merged and trained logits differ by {result.agreement.relative_difference:.2g} of the largest logit, "
                f"more than the {result.bound:.0e} that rounding to {dtype} explains",
                where=str(target),
                hint="choose a wider --dtype",
            )
        write_json(folder / "merge.json", result.to_json())
        use = "ft generate" if dtype == QUANTIZED else "vllm serve"
        what = (
            f"{result.base['name']} with what {context.recipe.adapter.method} has trained in its weights, in {dtype}."
        )
        write_card(trained, folder, what, [f"{use} ./{run.path.name}"], result.to_json())
    return result


def refuse_taken(target: Path, overwrite: bool) -> None:
    """Refuse to write where something is, unless that was asked for.

    Raises:
        RefusedError: The folder is there.
    """
    if target.exists() and not overwrite:
        raise RefusedError("the folder is there already", where=str(target), hint="choose --output, or add --overwrite")


def verification_rows(trained: FineTunedRun, on_event: EventHandler) -> Verification:
    """Real rows, held-out ones if there are any, as many as fill a batch of VERIFICATION_TOKENS."""
    split = trained.context.read_data(on_event)
    held_out = len(split.validation) > 0
    rows: list[Example] = []
    longest = 0
    for example in split.validation if held_out else split.train:
        cut = Example(example.ids[:ROW_TOKENS], example.is_target[:ROW_TOKENS])
        longest = max(longest, len(cut.ids))
        if (len(rows) + 1) * longest > VERIFICATION_TOKENS:
            break
        rows.append(cut)
    return Verification(held_out, rows)


def streamed_logits(streamed: StreamedModel, model: nn.Module, examples: Sequence[Example]) -> list[Tensor]:
    """`logits_of` a model over a streamed base.

    Architectures whose layers reach into each other's weights need all of them at once: there logits are no numbers
    otherwise.
    """
    with streamed.streaming():
        logits = logits_of(model, examples)
    if all(logits_KV.isfinite().all() for logits_KV in logits):
        return logits
    with streamed.filled():
        return logits_of(model, examples)


def _trained_logits(trained: FineTunedRun, examples: Sequence[Example], on_event: EventHandler) -> list[Tensor]:
    """Logits of base plus trained weights in float32, as they were trained.

    A quantizer that rounds inputs too adds noise that no merge can reproduce: there the base is dequantized.
    """
    base = trained.stream_base(on_event, dequantized=False)
    model: nn.Module = base.model
    if not trained.context.recipe.adapter.trains_base:
        model = trained.attach(base.model, on_event)
    on_event(Phase("computing the trained model's logits"))
    return streamed_logits(base, model, examples)


def _write(trained: FineTunedRun, folder: Path, dtype: str, on_event: EventHandler) -> None:
    context = trained.context
    if dtype == QUANTIZED:
        base = trained.stream_base(on_event, dequantized=False)
        on_event(Phase("merging into the quantized weights"))
        context.method.load(base.model, trained.weights)
        write_merged_quantized(base, context.method.merge_quantized, folder)
    else:
        base = trained.stream_base(on_event, dequantized=True)
        on_event(Phase(f"merging in {dtype}"))
        if not context.recipe.adapter.trains_base:
            context.method.mergeable(base.model, trained.weights)
        write_merged(base, peft_bridge.merge_layer, DTYPES[dtype], folder)
    context.tokenizer.save_pretrained(folder)


def written_logits(trained: FineTunedRun, folder: Path, examples: Sequence[Example]) -> list[Tensor]:
    """Logits in float32 of a model that was written from a run, read back from the disk."""
    context = trained.context
    written = StreamedModel(
        ModelFolder(folder, str(folder)),
        context.section,
        Quantizers(NoQuantization()),
        context.accelerator.device,
        dequantized=False,
    )
    return streamed_logits(written, written.model, examples)

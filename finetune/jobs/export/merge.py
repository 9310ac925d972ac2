"""`ft merge`: an adapter merged into the base's weights, and verified on real rows.

Base, adapter and merged model are read and written a layer at a time: no full model is in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from finetune.adapters import peft_bridge
from finetune.adapters.base import AdapterMethod
from finetune.data.encode import Example
from finetune.errors import UnsupportedError
from finetune.evaluation.agreement import Agreement, agreement
from finetune.jobs.export.card_usage import model_usage, quantized_usage
from finetune.jobs.export.engine_prompts import PromptAgreement, as_json, compare_vllm
from finetune.jobs.export.model_card import public_name, write_card
from finetune.jobs.export.opening import open_for_output
from finetune.jobs.export.verification import (
    BOUNDS,
    QUANTIZED,
    check_agreement,
    streamed_logits,
    verification_rows,
    written_logits,
)
from finetune.jobs.load.context import TrainingContext
from finetune.jobs.load.trained_run import FineTunedRun
from finetune.jobs.load.training_record import facts_for_prompts, trained_files
from finetune.models.fingerprint import fingerprint_files
from finetune.models.loading.dtype import DTYPES
from finetune.models.safetensors_io import StoredTensor
from finetune.models.writing.ends import write_ends
from finetune.models.writing.rewrite import write_merged, write_merged_quantized
from finetune.models.writing.unbuilt import UnbuiltTensors
from finetune.report.run_page import recording_errors
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler, Phase, ignore
from finetune.storage.files import write_json, written_aside


@dataclass(frozen=True)
class MergeResult:
    """A merged model and its verification.

    Attributes:
        folder: A model folder: one that plain transformers loads, or of quantized weights.
        dtype: Of its weights, or QUANTIZED.
        uses_chat_template: Whether the run was trained through the chat template.
        answer_ends: Ids of the tokens that end trained answers.
        today: The date that the chat template wrote in training; None where it writes none.
        named_tokens: Tokens that were added or trained by name: words, also where they are control tokens.
        base: Name, commit and fingerprint of the base.
        adapter: Method and fingerprint of the adapter.
        held_out: Whether the compared rows are validation rows.
        bound: The largest allowed `agreement.relative_difference`.
        agreement: Logits of the merged model, read back from disk, against those of base and adapter, both in float32.
        engines: The tokens of prompts in vLLM, compared with those of the training.
        unbuilt: Tensors of the base that its class does not build.
    """

    folder: Path
    dtype: str
    uses_chat_template: bool
    answer_ends: list[int]
    today: str | None
    named_tokens: list[str]
    base: dict[str, Any]
    adapter: dict[str, Any]
    held_out: bool
    bound: float
    agreement: Agreement
    engines: list[PromptAgreement]
    unbuilt: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """The verification report: the content of `merge.json`."""
        facts = {key: value for key, value in vars(self).items() if key not in ("folder", "agreement", "engines")}
        numbers = {**asdict(self.agreement), "relative_difference": self.agreement.relative_difference}
        return {**facts, **numbers, "engines": as_json(self.engines)}


def merge(
    run: RunDirectory,
    output: Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    on_event: EventHandler = ignore,
    is_final: bool = True,
) -> MergeResult:
    """Merge the run's adapter into its base, and write the model.

    The adapter is merged into the weights that it was trained on: for a quantized base its dequantized weights, or the
    quantized weights themselves.

    Args:
        run: A finished run.
        output: Folder to write, by default the run's `merged/`.
        dtype: Of the written weights; QUANTIZED keeps the base's codes. By default QUANTIZED for methods that merge
            into quantized weights without loss, and else float32.
        overwrite: Replace an existing folder.
        on_event: Receives an event at every phase.
        is_final: Whether the folder is for use, and not a step to another output: engines that read it are compared
            with the training, and it has the tensors of the base that its class does not build.

    Raises:
        UnsupportedError: The method cannot be merged, or not into quantized weights, or the base has none.
        RefusedError: The base is not that of the training or changed meanwhile, the folder exists, or the merged model
            does not agree with the trained one. Nothing is written then.
    """
    target = (output or run.merged).absolute()
    trained = open_for_output(run, target, overwrite, lambda context: _check_support(context, dtype), on_event)
    context = trained.context
    dtype = dtype or (QUANTIZED if context.method.fits_quantized else "float32")
    verification = verification_rows(trained, on_event)
    reference = _trained_logits(trained, verification.rows, on_event)
    # Written aside: the folder gets its final name only if the model has passed the verification.
    unbuilt = UnbuiltTensors.of(context.folder, context.section)
    with recording_errors(run), written_aside(target) as folder:
        _write(trained, folder, dtype, unbuilt.tensors if is_final else {}, on_event)
        context.folder.check_unchanged()
        if is_final:
            unbuilt.check_carried(folder)
        on_event(Phase("comparing merged and trained logits"))
        result = MergeResult(
            folder=target,
            dtype=dtype,
            **facts_for_prompts(trained.record),
            base={**trained.record.base.summary, "name": public_name(context.section)},
            adapter={
                "method": context.recipe.adapter.method,
                "fingerprint": fingerprint_files(trained_files(trained.weights)),
            },
            held_out=verification.held_out,
            bound=BOUNDS[dtype],
            agreement=agreement(reference, written_logits(trained, folder, verification.rows)),
            engines=compare_vllm(trained, folder, on_event) if is_final and dtype != QUANTIZED else [],
            unbuilt=unbuilt.report(carried=is_final),
        )
        check_agreement(result, dtype)
        write_json(folder / "merge.json", result.to_json())
        usage = quantized_usage() if dtype == QUANTIZED else model_usage(trained)
        stored = "the quantized weights of the base" if dtype == QUANTIZED else dtype
        what = f"{result.base['name']}, fine-tuned with {context.recipe.adapter.method} and merged, in {stored}."
        write_card(trained, folder, what, usage, result.to_json())
    return result


def _check_support(context: TrainingContext, dtype: str | None) -> None:
    """Check that the method can be merged, in this type."""
    context.method.check_merge()
    if dtype == QUANTIZED:
        check_fits_quantized(context.method, "--dtype", "choose float32, bfloat16 or float16")


def check_fits_quantized(method: AdapterMethod, where: str, hint: str) -> None:
    """Check before weights are loaded that a method merges into quantized weights.

    Args:
        method: The run's method.
        where: The command's option.
        hint: Values of it that fit every method.

    Raises:
        UnsupportedError: It does not.
    """
    if not method.fits_quantized:
        raise UnsupportedError(
            f"an update of {method.section.method} cannot be merged into quantized weights without rounding",
            where=where,
            hint=f"{hint}; adapter.method: qa_lora merges into quantized weights",
        )


def _trained_logits(trained: FineTunedRun, examples: Sequence[Example], on_event: EventHandler) -> list[Tensor]:
    """Float32 logits of the base with its adapter, quantized as in training."""
    # But for layers whose quantizer rounds activations too: no merge can reproduce that noise, and `StreamedModel`
    # dequantizes them.
    base = trained.stream_base(on_event, dequantized=False)
    model: nn.Module = base.model
    if not trained.context.recipe.adapter.trains_base:
        model = trained.attach(base.model, on_event)
    on_event(Phase("computing the trained model's logits"))
    return streamed_logits(base, model, examples)


def _write(
    trained: FineTunedRun, folder: Path, dtype: str, further: Mapping[str, StoredTensor], on_event: EventHandler
) -> None:
    context = trained.context
    if dtype == QUANTIZED:
        base = trained.stream_base(on_event, dequantized=False)
        on_event(Phase("merging into the quantized weights"))
        context.method.load(base.model, trained.weights)
        write_merged_quantized(base, context.method.merge_quantized, folder, further)
    else:
        base = trained.stream_base(on_event, dequantized=True)
        on_event(Phase(f"merging in {dtype}"))
        if not context.recipe.adapter.trains_base:
            context.method.mergeable(base.model, trained.weights)
        write_merged(base, peft_bridge.merge_layer, DTYPES[dtype], folder, further)
    context.tokenizer.save_pretrained(folder)
    write_ends(folder, trained.record.answer_ends, folder)

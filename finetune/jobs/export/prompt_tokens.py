"""`ft export`: a soft prompt as tokens of the vocabulary of a plain model, verified on real rows."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from finetune.adapters.base import PromptTokens
from finetune.data.encode import Example
from finetune.data.text_tokens import Affixes
from finetune.evaluation.agreement import Agreement, agreement, logits_of
from finetune.jobs.export.card_usage import model_usage
from finetune.jobs.export.engine_prompts import PromptAgreement, as_json, compare, run_prompts
from finetune.jobs.export.engines import RunPrompt, Vllm
from finetune.jobs.export.model_card import public_name, write_card
from finetune.jobs.export.opening import open_for_output
from finetune.jobs.export.verification import BOUNDS, check_agreement, verification_rows
from finetune.jobs.load.trained_run import FineTunedRun
from finetune.jobs.load.training_record import facts_for_prompts
from finetune.models.linear_layers import dequantize_model, rounds_activations
from finetune.models.loading.dtype import DTYPES
from finetune.models.writing.ends import write_ends
from finetune.models.writing.unbuilt import UnbuiltTensors
from finetune.report.run_page import recording_errors
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler, Phase, ignore
from finetune.storage.files import write_json, written_aside


@dataclass(frozen=True)
class ExportResult:
    """An exported model and its verification.

    Attributes:
        folder: A model folder that plain transformers loads.
        dtype: Of its weights.
        prompt: The beginning of every input, as a text that is tokenized without adding special tokens.
        uses_chat_template: Whether the run was trained through the chat template, which then begins with the prompt.
        answer_ends: Ids of the tokens that end trained answers.
        today: The date that the chat template wrote in training; None where it writes none.
        named_tokens: Tokens that were added or trained by name: words, also where they are control tokens.
        held_out: Whether the compared rows are validation rows.
        bound: The largest allowed `agreement.relative_difference`.
        agreement: Logits of the model, read back from disk, after the new tokens, against those of the base with its
            soft prompt; both in float32 and over the tokens of the base's tokenizer.
        engines: The tokens of prompts in vLLM, compared with those of the training after the new tokens.
        unbuilt: Tensors of the base that its class does not build.
    """

    folder: Path
    dtype: str
    prompt: str
    uses_chat_template: bool
    answer_ends: list[int]
    today: str | None
    named_tokens: list[str]
    held_out: bool
    bound: float
    agreement: Agreement
    engines: list[PromptAgreement]
    unbuilt: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """The verification report: the content of `export.json`."""
        facts = {key: value for key, value in vars(self).items() if key not in ("folder", "agreement", "engines")}
        numbers = {**asdict(self.agreement), "relative_difference": self.agreement.relative_difference}
        return {**facts, **numbers, "engines": as_json(self.engines)}


def export(
    run: RunDirectory,
    output: Path | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    on_event: EventHandler = ignore,
) -> ExportResult:
    """Write the run's base with the trained prompt as tokens of its vocabulary, in full precision.

    Args:
        run: A finished run.
        output: Folder to write, by default one of this type in the run's `exported/`.
        dtype: Of the written weights.
        overwrite: Replace an existing folder.
        on_event: Receives an event at every phase.

    Raises:
        UnsupportedError: The run has not trained a prompt of embeddings.
        RefusedError: The base is not that of the training, the folder exists, or the exported model does not agree with
            the trained one. Nothing is written then.
    """
    target = (output or run.export_folder("prompt", dtype)).absolute()
    trained = open_for_output(run, target, overwrite, lambda context: context.method.check_prompt_export(), on_event)
    known = len(trained.context.tokenizer)
    verification = verification_rows(trained, on_event)
    examples = verification.rows
    prompts = run_prompts(trained, on_event)  # before the tokenizer gets the new tokens
    on_event(Phase("computing the trained model's logits"))
    # Only the tokens of the base: the exported vocabulary has the prompt's tokens after them.
    reference = [logits_KV[:, :known] for logits_KV in _trained_logits(trained, examples, on_event)]
    gc.collect()  # the model has reference cycles, and the next one needs its memory
    with recording_errors(run), written_aside(target) as folder:
        on_event(Phase(f"writing the prompt as tokens in {dtype}"))
        exported_prompt = _write_prompt_tokens(trained, folder, DTYPES[dtype], _least_likely_token(reference), on_event)
        unbuilt = UnbuiltTensors.of(trained.context.folder, trained.context.section)
        unbuilt.append_to(folder)
        unbuilt.check_carried(folder)
        gc.collect()
        on_event(Phase("comparing exported and trained logits"))
        reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        behind = [
            Example(exported_prompt.ids + row.ids, [False] * len(exported_prompt.ids) + row.is_target)
            for row in examples
        ]
        # Without the positions of the prompt, which the trained model has no logits for.
        found = [logits_KV[len(exported_prompt.ids) :, :known] for logits_KV in logits_of(reloaded, behind)]
        result = ExportResult(
            folder=target,
            dtype=dtype,
            prompt=exported_prompt.text
            if trained.record.uses_chat_template
            else exported_prompt.text + _begin_of_text(trained.context.tokenizer),
            **facts_for_prompts(trained.record),
            held_out=verification.held_out,
            bound=BOUNDS[dtype],
            agreement=agreement(reference, found),
            engines=_compare_engines(trained, folder, exported_prompt, prompts),
            unbuilt=unbuilt.report(carried=True),
        )
        check_agreement(result, dtype)
        write_json(folder / "export.json", result.to_json())
        _write_card(trained, folder, result)
    return result


def _write_card(trained: FineTunedRun, folder: Path, result: ExportResult) -> None:
    recipe = trained.context.recipe
    base, adapter = public_name(recipe.model), recipe.adapter
    where = ", which the chat template writes" if result.uses_chat_template else ""
    what = (
        f"{base}, with a prompt of {adapter.prompt_tokens} tokens that {adapter.method} trained, in {result.dtype}. "
        f"They are new tokens of the vocabulary{where}."
    )
    usage = model_usage(trained, "" if result.uses_chat_template else result.prompt)
    write_card(trained, folder, what, usage, result.to_json())


def _trained_logits(trained: FineTunedRun, examples: Sequence[Example], on_event: EventHandler) -> list[Tensor]:
    """Float32 logits of the base with its soft prompt; without a quantizer that also rounds activations."""
    base = trained.load_base(on_event, torch.float32)
    if rounds_activations(base):
        base = dequantize_model(base, torch.float32)
    return logits_of(trained.attach(base, on_event), examples)


def _compare_engines(
    trained: FineTunedRun, folder: Path, added: PromptTokens, prompts: Sequence[RunPrompt]
) -> list[PromptAgreement]:
    """Prompts in vLLM, whose chat template inserts the new tokens; plain text has to be sent with them."""
    if not trained.record.uses_chat_template:
        return []
    tokenizer = trained.context.tokenizer
    expected = [replace(each, text=added.text + each.text, ids=[*added.ids, *each.ids]) for each in prompts]
    return compare([Vllm(folder, tokenizer)], expected, tokenizer)


def _begin_of_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that this tokenizer puts before every text, if any: in training the prompt precedes it."""
    return str(tokenizer.decode(list(Affixes.of(tokenizer).before)))


def _least_likely_token(logits: Sequence[Tensor]) -> int:
    """The token whose highest logit over all rows is the lowest.

    The output rows of the prompt's tokens are copies of this token's, so that the model does not generate them. Zero
    rows would not do: a logit of 0 is the top-1 of models with negative logits, such as GPT-2.
    """
    return int(torch.cat(list(logits)).amax(dim=0).argmin())


def _write_prompt_tokens(
    trained: FineTunedRun, folder: Path, dtype: torch.dtype, unlikely: int, on_event: EventHandler
) -> PromptTokens:
    context = trained.context
    base = dequantize_model(trained.load_base(on_event, torch.float32), torch.float32)
    exported_prompt = context.method.export_prompt(base, trained.weights, context.tokenizer, unlikely)
    model = exported_prompt.model.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder)
    context.tokenizer.save_pretrained(folder)
    write_ends(folder, trained.record.answer_ends, folder)
    return exported_prompt

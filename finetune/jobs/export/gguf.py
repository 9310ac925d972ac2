"""`ft export --format gguf`: a run's model, or its adapter, for llama.cpp and Ollama, verified on real rows."""

from __future__ import annotations

import io
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from finetune.adapters import peft_bridge
from finetune.adapters.lora import LowRankMethod
from finetune.data.chat_template import ChatTemplate
from finetune.errors import UnsupportedError
from finetune.evaluation.agreement import Agreement, agreement, logits_of
from finetune.jobs.export.card_usage import gguf_adapter_usage, gguf_usage
from finetune.jobs.export.engine_prompts import PromptAgreement, as_json, compare, engine_adds_bos, run_prompts
from finetune.jobs.export.engines import LlamaCpp, Ollama, RunPrompt
from finetune.jobs.export.merge import check_fits_quantized, merge
from finetune.jobs.export.model_card import public_name, write_card
from finetune.jobs.export.ollama import OllamaTemplate, modelfile
from finetune.jobs.export.opening import open_for_output
from finetune.jobs.export.verification import QUANTIZED, check_agreement, verification_rows, written_logits
from finetune.jobs.load.context import TrainingContext
from finetune.jobs.load.trained_run import FineTunedRun
from finetune.models.linear_layers import modules_with_weight
from finetune.models.loading.expected_model import expected_model
from finetune.models.loading.layerwise import StreamedModel
from finetune.models.loading.model_files import ModelFolder
from finetune.models.writing.ends import ends_with
from finetune.models.writing.gguf import GgufType, GgufTypeError, check_gguf, write_gguf, write_gguf_adapter
from finetune.models.writing.gguf_vocabulary import DEFAULT, GgufVocabulary
from finetune.quantizers.choice import Quantizers
from finetune.recipe.sections.quantization import NoQuantization
from finetune.report.run_page import recording_errors
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler, Phase, ignore
from finetune.storage.files import write_json, written_aside
from finetune.storage.opening import write_new

logger = logging.getLogger(__name__)

BOUNDS: dict[GgufType, float] = {"f16": 1e-2, "q8_0": 8e-2, "q4_1": 1e-2}
"""Largest difference of two logits, as a fraction of the largest logit, that rounding to a type explains. Of a QA-LoRA
model in q4_1, only the minimums are rounded."""

MODEL, ADAPTER, TEMPLATE = "model.gguf", "adapter.gguf", "chat_template.jinja"


@dataclass(frozen=True)
class GgufResult:
    """A GGUF file and its verification.

    Attributes:
        folder: Contains `model.gguf`, a Modelfile for Ollama and the verification report.
        type: Of the weight matrices.
        merge: The verification report of the merge.
        engines: The tokens of prompts in llama.cpp and Ollama, compared with those of the training.
        bound: The largest allowed `agreement.relative_difference`.
        agreement: Logits of the file, read by transformers, against those of the merged model, both in float32.
    """

    folder: Path
    type: GgufType
    merge: dict[str, Any]
    engines: list[PromptAgreement]
    bound: float
    agreement: Agreement

    def to_json(self) -> dict[str, Any]:
        """The verification report: the content of `export.json`."""
        numbers = {**asdict(self.agreement), "relative_difference": self.agreement.relative_difference}
        copied = ("uses_chat_template", "answer_ends", "today", "named_tokens", "held_out", "unbuilt")
        of_run = {key: self.merge[key] for key in copied}
        facts = {"format": "gguf", "type": self.type, **of_run, "bound": self.bound}
        return {**facts, **numbers, "engines": as_json(self.engines), "merge": self.merge}


def export_gguf(
    run: RunDirectory,
    output: Path | None = None,
    kind: GgufType = "f16",
    overwrite: bool = False,
    on_event: EventHandler = ignore,
) -> GgufResult:
    """Write the run's model as a GGUF file with its tokenizer and chat template.

    Args:
        run: A finished run whose method can be merged.
        output: Folder to write, by default one of this type in the run's `exported/`.
        kind: Type of the weight matrices; q4_1 copies the codes of a 4-bit base with a qa_lora adapter.
        overwrite: Replace an existing folder.
        on_event: Receives an event at every phase.

    Raises:
        UnsupportedError: The method cannot be merged, or the architecture cannot be written as GGUF here.
        RefusedError: The base is not that of the training, the folder exists, or the file does not agree with the
            model. Nothing is written then.
    """
    target = (output or run.export_folder("gguf", kind)).absolute()
    trained = open_for_output(run, target, overwrite, lambda context: _check_support(context, kind), on_event)
    with recording_errors(run), written_aside(target) as folder:
        part = folder / "merged"
        # Through a verified merge, so that the comparison below sees the rounding of the file type only.
        merged = merge(run, part, QUANTIZED if kind == "q4_1" else "float32", on_event=on_event, is_final=False)
        on_event(Phase(f"writing {MODEL} in {kind}"))
        streamed = _streamed(trained, part)
        prompts = run_prompts(trained, on_event)
        with _naming_options(kind):
            vocabulary = _vocabulary(trained, prompts, streamed.model.config.vocab_size)
            write_gguf(streamed, vocabulary, kind, folder / MODEL, run.path.name)
        on_event(Phase("comparing the file's and the merged model's logits"))
        rows = verification_rows(trained, on_event).rows
        reread = _read_back(folder, streamed.model.config)
        found = agreement(written_logits(trained, part, rows), logits_of(reread, rows))
        engines = _write_modelfile(trained, vocabulary, prompts, part, folder)
        result = GgufResult(target, kind, merged.to_json(), engines, BOUNDS[kind], found)
        check_agreement(result, kind, hint="choose --dtype f16")
        shutil.rmtree(part)
        write_json(folder / "export.json", result.to_json())
        what = f"{result.merge['base']['name']}, fine-tuned and written for llama.cpp, in {kind}."
        write_card(trained, folder, what, gguf_usage(trained, MODEL), result.to_json(), relation="quantized")
    return result


def _check_support(context: TrainingContext, kind: GgufType) -> None:
    """Check that the model can be written as GGUF in this type: method, quantization, architecture and tokenizer."""
    context.method.check_merge()
    if kind == "q4_1":
        check_fits_quantized(context.method, f"--dtype {kind}", "choose f16 or q8_0")
    model = expected_model(context.folder, context.section, context.quantizers)
    with _naming_options(kind):
        check_gguf(model, kind)
        GgufVocabulary.of(context.tokenizer, model.config.vocab_size)


def _streamed(trained: FineTunedRun, merged: Path) -> StreamedModel:
    """The merged model, a layer at a time."""
    source = ModelFolder(merged, trained.context.folder.name)
    plain = Quantizers(NoQuantization())
    return StreamedModel(source, trained.context.section, plain, torch.device("cpu"), dequantized=False)


def _vocabulary(trained: FineTunedRun, prompts: Sequence[RunPrompt], size: int) -> GgufVocabulary:
    """The vocabulary of the run's tokenizer, with flags that let llama.cpp ask as the run was trained."""
    adds_bos = engine_adds_bos(trained, prompts)
    vocabulary = GgufVocabulary.of(trained.context.tokenizer, size, trained.record.answer_ends, adds_bos)
    if trained.record.uses_chat_template and DEFAULT not in vocabulary.templates:
        logger.warning(
            "the file has the chat templates %s, and none called %s: llama.cpp renders every prompt with tool_use, and "
            "Ollama has no template",
            ", ".join(vocabulary.templates),
            DEFAULT,
        )
    return vocabulary


def _write_modelfile(
    trained: FineTunedRun, vocabulary: GgufVocabulary, prompts: Sequence[RunPrompt], merged: Path, folder: Path
) -> list[PromptAgreement]:
    """Write the Modelfile; returns the tokens of prompts in the engines of the folder, compared with the training.

    Raises:
        RefusedError: The file has another vocabulary than the run.
    """
    tokenizer, record = trained.context.tokenizer, trained.record
    begin = vocabulary.tokens[vocabulary.special["bos"]] if vocabulary.adds_bos else ""
    template = OllamaTemplate.of(ChatTemplate(tokenizer), record.uses_chat_template, begin)
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ends = [*own, *ends_with(merged, record.answer_ends)] if record.answer_ends else own
    stops = tokenizer.convert_ids_to_tokens([end for end in dict.fromkeys(ends) if end < len(vocabulary.tokens)])
    write_new(folder / "Modelfile", modelfile(MODEL, template, stops))
    llama_cpp = LlamaCpp(folder / MODEL, vocabulary)
    has_template = template.text is not None
    engines = [llama_cpp, *([Ollama(template.turns, llama_cpp)] if has_template else [])]
    return compare(engines, prompts, tokenizer)


def export_gguf_adapter(
    run: RunDirectory, output: Path | None = None, overwrite: bool = False, on_event: EventHandler = ignore
) -> Path:
    """Write the run's adapter as a GGUF file that llama.cpp loads over a GGUF file of the base; returns the folder.

    Raises:
        UnsupportedError: It is not plain LoRA, or the base's architecture cannot be written as GGUF here.
        RefusedError: The base is not that of the training, or the folder exists.
    """
    target = (output or run.export_folder("gguf-adapter")).absolute()
    trained = open_for_output(run, target, overwrite, _check_adapter_support, on_event)
    method = trained.context.method
    on_event(Phase(f"writing {ADAPTER}"))
    streamed = trained.stream_base(on_event, dequantized=False)
    tied = modules_with_weight(streamed.model, streamed.model.get_input_embeddings().weight)
    loaded = method.load(streamed.model, trained.weights)
    layers = peft_bridge.low_rank_layers(loaded)
    embeddings = [*peft_bridge.adapted_embeddings(loaded), *(name for name in tied[1:] if name in layers)]
    if embeddings:  # llama.cpp looks up the ones, and has no tensor of its own for a tied head
        raise UnsupportedError(
            f"a GGUF adapter changes linear layers of the base's file, and {embeddings[0]} is its embeddings",
            where="adapter.target_modules",
            hint="export the full model: --format gguf",
        )
    factors = {}
    for name, layer in layers.items():
        a_RI, b_OR = layer.factors(peft_bridge.ADAPTER_NAME)
        # llama.cpp scales by alpha / r, which rsLoRA is not: the factor is part of B, and alpha is written as 0.
        factors[name] = a_RI, b_OR * layer.scaling[peft_bridge.ADAPTER_NAME]
    with recording_errors(run), written_aside(target) as folder, _naming_options():
        write_gguf_adapter(factors, streamed.model.config, folder / ADAPTER, run.path.name)
        what = f"A LoRA adapter in GGUF, for a GGUF file of {public_name(trained.context.section)}."
        usage = gguf_adapter_usage(trained, ADAPTER, _overrides(trained, folder))
        write_card(trained, folder, what, usage, relation="adapter")
    return target


def _check_adapter_support(context: TrainingContext) -> None:
    """Check that a GGUF file can hold all that the run trained, and names the layers of the base."""
    section = context.recipe.adapter
    further = [
        f"adapter.{key}" for key in ("dora", "modules_to_save", "trainable_tokens") if getattr(section, key, None)
    ]
    if context.recipe.model.new_tokens is not None:
        further.append("model.new_tokens")
    if not isinstance(context.method, LowRankMethod) or further:
        what = further[0] if further else f"adapter.method: {section.method}"
        raise UnsupportedError(
            "a GGUF adapter can contain low-rank updates only",
            where=what,
            hint="export the full model: --format gguf",
        )
    with _naming_options():
        check_gguf(expected_model(context.folder, context.section, context.quantizers))


def _overrides(trained: FineTunedRun, folder: Path) -> str:
    """Options of llama-server for what the run has instead of its base: a chat template, which is written, and an end.

    The file of the adapter has weights only: tokenizer, flags and ends are those of the base's file.
    """
    recipe, record, tokenizer = trained.context.recipe, trained.record, trained.context.tokenizer
    options = [
        f"--override-kv tokenizer.ggml.eot_token_id=int:{end}"
        for end in record.answer_ends
        if end != tokenizer.eos_token_id
    ][:1]
    template = ChatTemplate(tokenizer).sources.get(DEFAULT)
    if template and record.uses_chat_template and (recipe.chat_template or recipe.data.template_arguments):
        write_new(folder / TEMPLATE, template)
        options.append(f"--jinja --chat-template-file {TEMPLATE}")
    return "".join(f" {option}" for option in options)


@contextmanager
def _naming_options(kind: GgufType | None = None) -> Iterator[None]:
    """A context that adds the command's option to an UnsupportedError of the model layer, which knows no options."""
    try:
        yield
    except UnsupportedError as error:
        error.where = error.where or (f"--dtype {kind}" if isinstance(error, GgufTypeError) else "--format gguf")
        raise


def _read_back(folder: Path, config: PreTrainedConfig) -> nn.Module:
    """The file as transformers reads it, with the config of the base: GGUF metadata lacks some of its sizes."""
    config = deepcopy(config)
    if hasattr(config, "quantization_config"):  # it describes the merged model's codes, not the file's
        del config.quantization_config
    with redirect_stderr(io.StringIO()):  # no setting hides its progress bar
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=MODEL, config=config, dtype=torch.float32
        )
    return model

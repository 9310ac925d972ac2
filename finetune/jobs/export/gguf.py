"""`ft export --format gguf`: a run's model, or its adapter, for llama.cpp and Ollama, verified on real rows."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
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
from finetune.errors import UnsupportedError
from finetune.evaluation.agreement import Agreement, agreement, logits_of
from finetune.jobs.export.merge import merge
from finetune.jobs.export.model_card import public_name, write_card
from finetune.jobs.export.ollama import modelfile
from finetune.jobs.export.verification import QUANTIZED, check_agreement, verification_rows, written_logits
from finetune.jobs.load.trained_run import FineTunedRun
from finetune.models.loading.layerwise import StreamedModel
from finetune.models.loading.model_files import ModelFolder
from finetune.models.writing.gguf import GgufType, GgufTypeError, write_gguf, write_gguf_adapter
from finetune.quantizers.choice import Quantizers
from finetune.recipe.sections.quantization import NoQuantization
from finetune.report.run_page import recording_errors
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler, Phase, ignore
from finetune.storage.files import check_not_taken, write_json, written_aside

BOUNDS: dict[GgufType, float] = {"f16": 1e-2, "q8_0": 8e-2, "q4_1": 1e-2}
"""Largest difference of two logits, as a fraction of the largest logit, that rounding to a type explains. Of a QA-LoRA
model in q4_1, only the minimums are rounded."""

MODEL, ADAPTER = "model.gguf", "adapter.gguf"


@dataclass(frozen=True)
class GgufResult:
    """A GGUF file and its verification.

    Attributes:
        folder: Contains `model.gguf`, a Modelfile for Ollama and the verification report.
        type: Of the weight matrices.
        merge: The verification report of the merge.
        bound: The largest allowed `agreement.relative_difference`.
        agreement: Logits of the file, read by transformers, against those of the merged model, both in float32.
    """

    folder: Path
    type: GgufType
    merge: dict[str, Any]
    bound: float
    agreement: Agreement

    def to_json(self) -> dict[str, Any]:
        """The verification report: the content of `export.json`."""
        numbers = {**asdict(self.agreement), "relative_difference": self.agreement.relative_difference}
        uses_chat_template = self.merge["uses_chat_template"]
        facts = {"format": "gguf", "type": self.type, "uses_chat_template": uses_chat_template, "bound": self.bound}
        return {**facts, **numbers, "merge": self.merge}


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
        output: Folder to write, by default the run's `exported/`.
        kind: Type of the weight matrices; q4_1 copies the codes of a 4-bit base with a qa_lora adapter.
        overwrite: Replace an existing folder.
        on_event: Receives an event at every phase.

    Raises:
        UnsupportedError: The method cannot be merged, or the architecture cannot be written as GGUF here.
        RefusedError: The base is not that of the training, the folder exists, or the file does not agree with the
            model. Nothing is written then.
    """
    target = (output or run.exported).absolute()
    check_not_taken(target, overwrite, is_folder=True)
    with recording_errors(run), written_aside(target) as folder:
        part = folder / "merged"
        # Through a verified merge, so that the comparison below sees the rounding of the file type only.
        merged = merge(run, part, QUANTIZED if kind == "q4_1" else "float32", on_event=on_event)
        on_event(Phase(f"writing {MODEL} in {kind}"))
        trained = FineTunedRun.open(run, on_event)
        context = trained.context
        source = ModelFolder(part, context.folder.name)
        plain = Quantizers(NoQuantization())
        streamed = StreamedModel(source, context.section, plain, torch.device("cpu"), dequantized=False)
        with _naming_options(kind):
            write_gguf(streamed, context.tokenizer, kind, folder / MODEL, run.path.name)
        on_event(Phase("comparing the file's and the merged model's logits"))
        rows = verification_rows(trained, on_event).rows
        found = agreement(
            written_logits(trained, part, rows), logits_of(_read_back(folder, streamed.model.config), rows)
        )
        result = GgufResult(target, kind, merged.to_json(), BOUNDS[kind], found)
        check_agreement(result, kind, hint="choose --dtype f16")
        shutil.rmtree(part)
        (folder / "Modelfile").write_text(modelfile(context.tokenizer, MODEL), encoding="utf-8")
        write_json(folder / "export.json", result.to_json())
        name = run.path.name
        use = [f"llama-server -m ./{name}/{MODEL}", f"ollama create {name} -f ./{name}/Modelfile"]
        what = f"{result.merge['base']['name']}, fine-tuned and written for llama.cpp, in {kind}."
        write_card(trained, folder, what, use, result.to_json(), relation="quantized")
    return result


def export_gguf_adapter(
    run: RunDirectory, output: Path | None = None, overwrite: bool = False, on_event: EventHandler = ignore
) -> Path:
    """Write the run's adapter as a GGUF file that llama.cpp loads over a GGUF file of the base; returns the folder.

    Raises:
        UnsupportedError: It is not plain LoRA, or the base's architecture cannot be written as GGUF here.
        RefusedError: The base is not that of the training, or the folder exists.
    """
    target = (output or run.exported).absolute()
    check_not_taken(target, overwrite, is_folder=True)
    trained = FineTunedRun.open(run, on_event)
    method, section = trained.context.method, trained.context.recipe.adapter
    further = [key for key in ("dora", "modules_to_save", "trainable_tokens") if getattr(section, key, None)]
    if not isinstance(method, LowRankMethod) or further:
        what = f"adapter.{further[0]}" if further else f"adapter.method: {section.method}"
        raise UnsupportedError(
            "a GGUF adapter can contain low-rank updates only",
            where=what,
            hint="export the full model: --format gguf",
        )
    on_event(Phase(f"writing {ADAPTER}"))
    streamed = trained.stream_base(on_event, dequantized=False)
    layers = peft_bridge.low_rank_layers(method.load(streamed.model, trained.weights))
    factors = {}
    for name, layer in layers.items():
        a_RI, b_OR = layer.factors(peft_bridge.ADAPTER_NAME)
        # llama.cpp scales by alpha / r, which rsLoRA is not: the factor is part of B, and alpha is written as 0.
        factors[name] = a_RI, b_OR * layer.scaling[peft_bridge.ADAPTER_NAME]
    with recording_errors(run), written_aside(target) as folder, _naming_options():
        write_gguf_adapter(factors, streamed.model.config, folder / ADAPTER, run.path.name)
        what = f"A LoRA adapter in GGUF, for a GGUF file of {public_name(trained.context.section)}."
        write_card(trained, folder, what, [f"llama-server -m base.gguf --lora {ADAPTER}"], relation="adapter")
    return target


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

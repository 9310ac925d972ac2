"""`ft export`: a run's model for other programs, and onto the hub."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.errors import UsageError

from . import output
from .options import AsJson, Overwrite, Quiet, RunPath


class ExportFormat(StrEnum):
    """What can be written."""

    prompt = "prompt"
    adapter = "adapter"
    gguf = "gguf"
    gguf_adapter = "gguf-adapter"


class ExportedType(StrEnum):
    """Types of exported weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    f16 = "f16"
    q8_0 = "q8_0"
    q4_1 = "q4_1"


TYPES = {
    ExportFormat.prompt: (ExportedType.float32, ExportedType.bfloat16, ExportedType.float16),
    ExportFormat.gguf: (ExportedType.f16, ExportedType.q8_0, ExportedType.q4_1),
}
"""Of each format that has a choice, the usual one first."""


def export(
    run: RunPath,
    format: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            help="prompt: the base with a trained prompt as tokens of its vocabulary. adapter: a LoRA for PEFT and "
            "vLLM. gguf: the merged model for llama.cpp and Ollama. gguf-adapter: a LoRA for them.",
        ),
    ] = ExportFormat.prompt,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Folder to write; by default exported/ in the run.")
    ] = None,
    dtype: Annotated[
        ExportedType | None,
        typer.Option(
            "--dtype",
            show_default=False,
            help="Type of the weights. prompt: float32 (default), bfloat16, float16; gguf: f16 (default), q8_0, or "
            "q4_1, which takes the codes of a qa_lora run over 4 bits in groups of 32.",
        ),
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push", metavar="ORG/NAME", help="Send the folder to this repository of the hub.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it; else it is private.")] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's model for other programs. With a model card, and a proof that it says the same."""
    from finetune.run.directory import RunDirectory

    directory = RunDirectory.open(run)
    kind = _type(format, dtype)
    if public and push is None:
        raise UsageError("--public is about a repository of the hub", where="--public", hint="add --push ORG/NAME")
    verification = None
    with output.reporting(quiet, as_json) as report:
        if format is ExportFormat.prompt:
            from finetune.jobs.export.prompt_tokens import export as export_prompt

            exported_prompt = export_prompt(directory, output, kind, overwrite, report)
            folder, verification = exported_prompt.folder, exported_prompt.to_json()
        elif format is ExportFormat.gguf:
            from finetune.jobs.export.gguf import export_gguf

            written = export_gguf(directory, output, kind, overwrite, report)
            folder, verification = written.folder, written.to_json()
        elif format is ExportFormat.gguf_adapter:
            from finetune.jobs.export.gguf import export_gguf_adapter

            folder = export_gguf_adapter(directory, output, overwrite, report)
        else:
            from finetune.jobs.export.peft_adapter import export_adapter

            folder = export_adapter(directory, output, overwrite, report)
        address = None
        if push is not None:
            from finetune.jobs.export.hub_push import push as push_folder

            address = push_folder(folder, push, public, report)
    output.show_export(format.value, verification, folder, push, address, as_json)


def _type(format: ExportFormat, dtype: ExportedType | None) -> Any:
    """The type to write in; formats without a choice have none."""
    choices = TYPES.get(format, ())
    if dtype is None:
        return choices[0].value if choices else ""
    if dtype not in choices:
        hint = f"choose {', '.join(choices)}" if choices else "leave --dtype out"
        raise UsageError(f"--format {format.value} does not come in {dtype.value}", where="--dtype", hint=hint)
    return dtype.value

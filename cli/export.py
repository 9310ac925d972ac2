"""`ft export`: write a run's model for other programs, and push it to the hub."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.errors import UsageError

from .event_log import event_handler
from .options import AsJson, Overwrite, Quiet, RunPath
from .views.export import show_export


class ExportFormat(StrEnum):
    """Export formats."""

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
"""Types of each format that offers a choice, the default first."""


def export(
    run: RunPath,
    format: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            help="prompt: the base with the trained prompt as new vocabulary tokens. adapter: a LoRA for PEFT and "
            "vLLM. gguf: the merged model for llama.cpp and Ollama. gguf-adapter: a LoRA for llama.cpp and Ollama.",
        ),
    ] = ExportFormat.prompt,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="DIR",
            show_default=False,
            help="Folder to write. Default: exported/FORMAT or exported/FORMAT-DTYPE in the run, such as "
            "exported/gguf-q8_0.",
        ),
    ] = None,
    dtype: Annotated[
        ExportedType | None,
        typer.Option(
            "--dtype",
            show_default=False,
            help="Type of the weights. prompt: float32 (default), bfloat16, float16; gguf: f16 (default), q8_0, or "
            "q4_1 (only for qa_lora over a 4-bit base in groups of 32, without requantization).",
        ),
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push", metavar="ORG/NAME", help="Push the folder to this hub repository.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make the pushed repository public. Default: private.")
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's model for other programs. With a model card and a verification report."""
    from finetune.run.directory import RunDirectory

    directory = RunDirectory.open(run)
    kind = _type(format, dtype)
    if public and push is None:
        raise UsageError("--public needs a repository of the hub", where="--public", hint="add --push ORG/NAME")
    if push is not None:
        from finetune.jobs.export.hub_push import check_repository

        check_repository(push)
    verification = None
    with event_handler(quiet, as_json) as on_event:
        if format is ExportFormat.prompt:
            from finetune.jobs.export.prompt_tokens import export as export_prompt

            exported_prompt = export_prompt(directory, output, kind, overwrite, on_event)
            folder, verification = exported_prompt.folder, exported_prompt.to_json()
        elif format is ExportFormat.gguf:
            from finetune.jobs.export.gguf import export_gguf

            written = export_gguf(directory, output, kind, overwrite, on_event)
            folder, verification = written.folder, written.to_json()
        elif format is ExportFormat.gguf_adapter:
            from finetune.jobs.export.gguf import export_gguf_adapter

            folder = export_gguf_adapter(directory, output, overwrite, on_event)
        else:
            from finetune.jobs.export.peft_adapter import export_adapter

            folder = export_adapter(directory, output, overwrite, on_event)
        address = None
        if push is not None:
            from finetune.jobs.export.hub_push import push as push_folder

            address = push_folder(folder, push, public, on_event)
    show_export(format.value, verification, folder, push, address, as_json)


def _type(format: ExportFormat, dtype: ExportedType | None) -> Any:
    """The type of the written weights; empty for formats without a choice."""
    choices = TYPES.get(format, ())
    if dtype is None:
        return choices[0].value if choices else ""
    if dtype not in choices:
        hint = f"choose {', '.join(choices)}" if choices else "omit --dtype"
        raise UsageError(f"--format {format.value} does not support {dtype.value}", where="--dtype", hint=hint)
    return dtype.value

"""A fine-tuned model in vLLM: a folder of plain weights, and a LoRA adapter that vLLM can serve."""

from __future__ import annotations

from pathlib import Path

from finetune.errors import UnsupportedError
from finetune.evaluation.engine import Generator
from finetune.jobs.load.finetuned_model import FineTunedModel
from finetune.models.loading.quantized_checkpoint import stored_quantization
from finetune.models.safetensors_io import INDEX
from finetune.models.weight_files import weight_files
from finetune.recipe.vllm_support import vllm_lora_rank
from finetune.run.events import EventHandler


def vllm_generator(finetuned: FineTunedModel, on_event: EventHandler) -> Generator:
    """A generator that runs a fine-tuned model in vLLM, which loads it at the first call.

    Raises:
        UnsupportedError: vLLM cannot load the model, or its outputs would differ from those of the trained model.
        UsageError: vLLM is not installed.
    """
    setup, trained = finetuned.setup, finetuned.trained
    if not setup.quantizers.quantize_nothing or stored_quantization(setup.folder):
        raise UnsupportedError(
            "its weights are quantized by ft, and vLLM does not load such weights",
            where=finetuned.label,
            hint="evaluate the folder that ft merge --dtype bfloat16 writes, or leave --engine out",
        )
    folder, adapter, rank = setup.folder.path, None, None
    if trained is not None:
        section = trained.method.section
        form = "config.json" if section.trains_base else "adapter_config.json"
        if not section.trains_base:
            rank = vllm_lora_rank(section, setup.quantizers.modules, setup.section.new_tokens is not None)
        if not (trained.weights / form).is_file():
            raise UnsupportedError(
                "vLLM does not load checkpoints",
                where=finetuned.label,
                hint="name the run when it has finished, or leave --engine out",
            )
        folder, adapter = (trained.weights, None) if section.trains_base else (folder, trained.weights)
    elif setup.folder.new_rows is not None:
        raise UnsupportedError(
            "vLLM loads the base as it is, without rows for new tokens",
            where=finetuned.label,
            hint="leave --engine out",
        )
    _refuse_strays(folder)
    from finetune.evaluation.vllm_generator import VllmGenerator

    return VllmGenerator(
        finetuned.label,
        folder,
        setup.tokenizer,
        setup.compute_dtype,
        setup.accelerator.device.type,
        setup.positions.count,
        adapter,
        rank,
        finetuned.answer_ends,
        on_event,
    )


def _refuse_strays(folder: Path) -> None:
    """Check that vLLM reads the files that transformers reads: without an index it reads every safetensors file.

    Raises:
        UnsupportedError: It would read others.
    """
    files = weight_files(folder)
    if files.strays and files.start != folder / INDEX:
        raise UnsupportedError(
            f"vLLM would read {', '.join(files.strays[:3])} too, which is no part of the model",
            where=str(folder),
            hint="move such files to another folder, or leave --engine out",
        )

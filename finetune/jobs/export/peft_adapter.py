"""`ft export --format adapter`: a run's adapter as a folder that PEFT loads and vLLM serves."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from finetune.jobs.export.engine_prompts import compare_vllm
from finetune.jobs.export.model_card import public_name, write_card
from finetune.jobs.export.opening import open_for_output
from finetune.jobs.load.context import TrainingContext
from finetune.jobs.load.trained_run import FineTunedRun
from finetune.models.writing.ends import write_ends
from finetune.models.writing.unbuilt import UnbuiltTensors
from finetune.recipe.vllm_support import vllm_lora_rank
from finetune.run.directory import TRAINED_RECORD, RunDirectory
from finetune.run.events import EventHandler, ignore
from finetune.storage.files import written_aside

logger = logging.getLogger(__name__)


def export_adapter(
    run: RunDirectory, output: Path | None = None, overwrite: bool = False, on_event: EventHandler = ignore
) -> Path:
    """Write the adapter with its tokenizer, and a card with the command that serves it; returns the folder.

    The folder has generation settings, those of the base with the ends of the training, which vLLM reads if it is told
    to.

    Raises:
        UnsupportedError: vLLM would reject it, or compute something else than was trained.
        RefusedError: The base is not that of the training, or the folder exists.
    """
    target = (output or run.export_folder("adapter")).absolute()
    trained = open_for_output(run, target, overwrite, _rank, on_event)
    rank = _rank(trained.context)
    base = public_name(trained.context.section)
    name = run.path.name
    part = _part_of_checkpoint(trained)
    if part:
        logger.warning("%s", part.strip())
    with written_aside(target) as folder:
        own = ("ft_adapter.safetensors", TRAINED_RECORD)  # files of ft, which no engine reads
        shutil.copytree(trained.weights, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*own))
        ends = trained.record.answer_ends
        write_ends(trained.context.folder.path, ends, folder)
        compare_vllm(trained, folder, on_event)
        serve = (
            f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}=./{name} "
            f"--tokenizer ./{name}" + (f" --generation-config ./{name}" if ends else "")
        )
        kind = trained.context.recipe.quantization.kind
        stored = "" if kind == "none" else f", which was quantized to {kind} in training"
        write_card(trained, folder, f"A LoRA adapter for {base}{stored}.{part}", [serve], relation="adapter")
    return target


def _rank(context: TrainingContext) -> int:
    """The --max-lora-rank with which vLLM serves the adapter.

    Raises:
        UnsupportedError: It does not.
    """
    recipe = context.recipe
    return vllm_lora_rank(recipe.adapter, recipe.modules, recipe.model.new_tokens is not None)


def _part_of_checkpoint(trained: FineTunedRun) -> str:
    """A remark where the adapter's names are not those of the checkpoint's own class; else empty."""
    folder = trained.context.folder
    named = folder.config().get("architectures")
    whole = named[0] if isinstance(named, list) and named else None
    unbuilt = UnbuiltTensors.of(folder, trained.context.section)
    if not unbuilt.tensors or whole in (None, unbuilt.model_class):
        return ""
    return (
        f" The adapter fits {unbuilt.model_class}, a part of the checkpoint. Programs that build {whole} from the "
        "checkpoint, such as vLLM, may not find its layers: they load the folder that ft merge writes."
    )

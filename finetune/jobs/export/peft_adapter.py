"""`ft export --format adapter`: a run's adapter as a folder that PEFT loads and vLLM serves."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from finetune.jobs.export.card_recipe import base_reference
from finetune.jobs.export.card_usage import adapter_usage
from finetune.jobs.export.engine_prompts import compare_vllm
from finetune.jobs.export.model_card import public_name, write_card
from finetune.jobs.export.opening import open_for_output
from finetune.jobs.load.context import TrainingContext
from finetune.jobs.load.trained_run import FineTunedRun
from finetune.models.writing.ends import write_ends
from finetune.models.writing.unbuilt import UnbuiltTensors
from finetune.recipe.local_model import ADAPTER_CONFIG
from finetune.recipe.vllm_support import vllm_lora_rank
from finetune.run.directory import TRAINED_RECORD, RunDirectory
from finetune.run.events import EventHandler, ignore
from finetune.storage.files import write_json, written_aside
from finetune.storage.opening import read_json

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
    part = _part_of_checkpoint(trained)
    if part:
        logger.warning("%s", part.strip())
    with written_aside(target) as folder:
        own = ("ft_adapter.safetensors", TRAINED_RECORD)  # files of ft, which no engine reads
        shutil.copytree(trained.weights, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*own))
        _name_base(trained, folder / ADAPTER_CONFIG)
        write_ends(trained.context.folder.path, trained.record.answer_ends, folder)
        compare_vllm(trained, folder, on_event)
        kind = trained.context.recipe.quantization.kind
        stored = "" if kind == "none" else f", which was quantized to {kind} in training"
        what = f"A LoRA adapter for {base}{stored}.{part}"
        write_card(trained, folder, what, adapter_usage(trained, rank), relation="adapter")
    return target


def _name_base(trained: FineTunedRun, file: Path) -> None:
    """Name the base in the adapter's config as the card does: PEFT writes its folder on this machine."""
    write_json(file, {**read_json(file), "base_model_name_or_path": base_reference(trained.context.recipe)})


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

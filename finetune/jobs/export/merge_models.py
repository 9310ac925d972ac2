"""`ft merge` of several runs over one base: their weights, merged into one model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.adapters import peft_bridge
from finetune.errors import RefusedError
from finetune.evaluation.agreement import Agreement, agreement
from finetune.jobs.export.engine_prompts import PromptAgreement, as_json, compare_vllm
from finetune.jobs.export.merge import merge
from finetune.jobs.export.model_card import CARD
from finetune.jobs.export.opening import open_for_output
from finetune.jobs.export.verification import verification_rows, written_logits
from finetune.jobs.load.trained_run import FineTunedRun
from finetune.models.loading.dtype import DTYPES
from finetune.models.writing.ends import write_ends
from finetune.models.writing.rewrite import write_merged
from finetune.models.writing.unbuilt import UnbuiltTensors
from finetune.models.writing.weight_merging import WeightMerge, merge_weights
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler, Phase, ignore
from finetune.storage.files import write_json, written_aside
from finetune.storage.opening import read_json


@dataclass(frozen=True)
class ModelMergeResult:
    """A combined model, and its agreement with each run.

    Attributes:
        folder: A model folder that plain transformers loads.
        dtype: Of its weights.
        uses_chat_template: Whether every run was trained through the chat template.
        answer_ends: Ids of the tokens that end trained answers of any run.
        named_tokens: Tokens that were added or trained by name in any run.
        combination: The rule and the weights of the runs.
        agreements: By the name of a run: combined logits against the logits of the run, on rows of the run.
        engines: By the name of a run: tokens of its prompts in vLLM, compared with those of its training.
        unbuilt: Tensors of the base that its class does not build.
    """

    folder: Path
    dtype: str
    uses_chat_template: bool
    answer_ends: list[int]
    named_tokens: list[str]
    combination: WeightMerge
    agreements: dict[str, Agreement]
    engines: dict[str, list[PromptAgreement]]
    unbuilt: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """The content of `merge.json`."""
        return {
            "dtype": self.dtype,
            "uses_chat_template": self.uses_chat_template,
            "answer_ends": self.answer_ends,
            "named_tokens": self.named_tokens,
            "combination": asdict(self.combination),
            "unbuilt": self.unbuilt,
            "runs": {
                name: {**asdict(found), "engines": as_json(self.engines[name])}
                for name, found in self.agreements.items()
            },
        }


def combine(
    runs: Sequence[RunDirectory],
    combination: WeightMerge,
    output: Path,
    dtype: str = "float32",
    overwrite: bool = False,
    on_event: EventHandler = ignore,
) -> ModelMergeResult:
    """Merge several runs over one base into one model.

    Each run is merged and verified by itself first; its task vector is the difference from the base. That needs disk
    space for one float32 model per run, and for one of the base.

    Args:
        runs: Finished runs over the same base, quantized in the same way.
        combination: The rule, and a weight for each run.
        output: Folder to write.
        dtype: Of the written weights.
        overwrite: Replace an existing folder.
        on_event: Receives an event at every phase.

    Raises:
        RefusedError: The runs have different bases, a merge does not agree with its run, or the folder exists.
    """
    target = output.absolute()
    opened = [
        open_for_output(run, target, overwrite, lambda context: context.method.check_merge(), on_event) for run in runs
    ]
    _refuse_other_bases(opened)
    with written_aside(target) as folder:
        parts = [folder / f"part-{index}" for index in range(len(runs))]
        for run, part in zip(runs, parts, strict=True):
            merge(run, part, "float32", on_event=on_event, is_final=False)
        # The base goes through the same writer as the merged runs, so that names and dtypes are the same.
        start = folder / "base"
        start.mkdir()
        write_merged(opened[0].stream_base(on_event, dequantized=True), peft_bridge.merge_layer, torch.float32, start)
        opened[0].context.folder.check_unchanged()
        on_event(Phase(f"combining {len(runs)} runs by {combination.rule}"))
        unbuilt = UnbuiltTensors.of(opened[0].context.folder, opened[0].context.section)
        merge_weights(start, parts, combination, DTYPES[dtype], folder, unbuilt.tensors)
        unbuilt.check_carried(folder)
        not_copied = shutil.ignore_patterns("*.safetensors", "merge.json", CARD, "model.safetensors.index.json")
        shutil.copytree(parts[0], folder, ignore=not_copied, dirs_exist_ok=True)
        # Copied from the float32 part: transformers would load the weights in that dtype.
        config = read_json(folder / "config.json")
        write_json(folder / "config.json", _in_dtype(config, dtype))
        answer_ends = list(dict.fromkeys(end for trained in opened for end in trained.record.answer_ends))
        write_ends(folder, answer_ends, folder)
        on_event(Phase("comparing the combined model with each run"))
        agreements, engines = {}, {}
        for trained, part in zip(opened, parts, strict=True):
            examples = verification_rows(trained, on_event).rows
            own, combined = (written_logits(trained, each, examples) for each in (part, folder))
            agreements[trained.run.path.name] = agreement(own, combined)
            engines[trained.run.path.name] = compare_vllm(trained, folder, on_event)
        for temporary in (*parts, start):
            shutil.rmtree(temporary)
        uses_chat_template = all(trained.record.uses_chat_template for trained in opened)
        named = list(dict.fromkeys(token for trained in opened for token in trained.record.named_tokens))
        result = ModelMergeResult(
            target,
            dtype,
            uses_chat_template,
            answer_ends,
            named,
            combination,
            agreements,
            engines,
            unbuilt.report(carried=True),
        )
        write_json(folder / "merge.json", result.to_json())
    return result


def _in_dtype(config: Any, dtype: str) -> Any:
    """A config whose model, and each part of it, loads in a dtype."""
    if not isinstance(config, dict):
        return config
    changed = {key: _in_dtype(value, dtype) for key, value in config.items()}
    return {**changed, "dtype": dtype} if "dtype" in config else changed


def _refuse_other_bases(opened: Sequence[FineTunedRun]) -> None:
    first = opened[0]
    for other in opened[1:]:
        same = (other.record.base.fingerprint, other.record.quantized_base) == (
            first.record.base.fingerprint,
            first.record.quantized_base,
        )
        if not same:
            raise RefusedError(
                f"{other.run.path.name} was trained on another base than {first.run.path.name}, or on another "
                "quantization of it",
                where=str(other.run.path),
                hint="combine runs over one base",
            )
        if other.record.model.new_tokens != first.record.model.new_tokens:
            raise RefusedError(
                f"{other.run.path.name} has other new tokens than {first.run.path.name}",
                where=str(other.run.path),
                hint="combine runs with the same model.new_tokens",
            )

"""`ft export --format adapter`: a run's adapter as a folder that PEFT loads and vLLM serves."""

from __future__ import annotations

import shutil
from pathlib import Path

from finetune.errors import UnsupportedError
from finetune.jobs.card import public_name, write_card
from finetune.jobs.merge import refuse_taken
from finetune.jobs.trained import TrainedRun
from finetune.recipe.adapter import LowRank, QaLora
from finetune.run.directory import TRAINED_RECORD, RunDirectory, written_aside
from finetune.run.events import Report, ignore

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank can be, from its configuration's MaxLoRARanks."""


def export_adapter(
    run: RunDirectory, output: Path | None = None, overwrite: bool = False, report: Report = ignore
) -> Path:
    """Write the adapter with its tokenizer, and a card with the command that serves it; returns the folder.

    Raises:
        UnsupportedError: vLLM would refuse it, or serve something else than was trained.
        RefusedError: The base is another one, or the folder is taken.
    """
    target = (output or run.exported).absolute()
    refuse_taken(target, overwrite)
    trained = TrainedRun.open(run, report)
    rank = served_rank(trained)
    base = public_name(trained.bench.section)
    name = run.path.name
    with written_aside(target) as folder:
        own = ("ft_adapter.safetensors", TRAINED_RECORD)  # of these no engine knows
        shutil.copytree(trained.weights, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*own))
        serve = f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}=./{name}"
        kind = trained.bench.recipe.quantization.kind
        stored = "" if kind == "none" else f", which was stored in {kind} while it trained"
        write_card(trained, folder, f"A LoRA adapter for {base}{stored}.", [serve], relation="adapter")
    return target


def served_rank(trained: TrainedRun) -> int:
    """The least --max-lora-rank under which vLLM serves the adapter.

    Raises:
        UnsupportedError: It would refuse it, or ignore a part of it.
    """
    recipe = trained.bench.recipe
    section = recipe.adapter
    merged = "merge it and serve the model: ft merge"
    if not isinstance(section, LowRank):
        raise UnsupportedError(
            f"vLLM serves LoRA adapters, and none that {section.method} trains", where="adapter.method", hint=merged
        )
    if isinstance(section, QaLora):
        raise UnsupportedError("the adapter belongs to a base that only ft stores", where="adapter.method", hint=merged)
    for key, what in (
        ("dora", "vLLM serves no DoRA"),
        ("modules_to_save", "vLLM refuses adapters with whole modules"),
        ("trainable_tokens", "vLLM does not read trained embeddings of single tokens"),
    ):
        if getattr(section, key, None):
            raise UnsupportedError(what, where=f"adapter.{key}", hint=merged)
    own = [rule.adapter for rule in recipe.modules if rule.adapter is not None]
    if section.method != "adalora" and any(each.r or each.alpha for each in own):
        raise UnsupportedError(
            "vLLM gives every layer the same rank and scale, and modules sets others", where="modules", hint=merged
        )
    rank = section.r * (2 if getattr(section, "initialization", "zero") in ("pissa", "olora") else 1)
    fitting = [each for each in RANKS if each >= rank]
    if not fitting:
        raise UnsupportedError(f"vLLM serves ranks up to {RANKS[-1]}, not {rank}", where="adapter.r", hint=merged)
    return fitting[0]

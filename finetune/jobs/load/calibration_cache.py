"""Cache of bases with calibrated quantization, by base, recipe section and calibration rows."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from finetune.data.dataset import TokenizedDataset
from finetune.data.mixing import sampled
from finetune.models.calibration import quantize_by_inputs
from finetune.models.fingerprint import fingerprint
from finetune.models.loading.dtype import file_dtype
from finetune.models.loading.load import load_model
from finetune.models.loading.model_files import ModelFolder
from finetune.models.loading.quantized_checkpoint import check_storable, save_quantized
from finetune.quantizers.choice import Quantizers
from finetune.quantizers.optq import ALGORITHM
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.quantization import NoQuantization
from finetune.run.events import EventHandler, Progress
from finetune.storage.cache import cached
from finetune.storage.files import write_json

RECORD = "calibration.json"
"""File in the folder: number of rows and tokens, and each layer's output error, with that of rounding to nearest."""


def calibrated_base(
    base: ModelFolder,
    quantizers: Quantizers,
    train: TokenizedDataset,
    seed: int,
    device: torch.device,
    on_event: EventHandler,
) -> ModelFolder:
    """The folder of the quantized base; calibrates it unless it is in the cache.

    All runs that share the entry have bitwise the same base. Calibration is deterministic on one machine, so an entry
    that left the cache is rebuilt with the same weights.

    Args:
        base: The model in full precision.
        quantizers: Quantizers of its layers, some of which need calibration.
        train: Training rows, from which calibration rows are sampled.
        seed: Seed of the sampling.
        device: Device of the calibration.
        on_event: Receives `Progress`.

    Raises:
        FinetuneError: The model does not support the quantization.
    """
    check_storable(quantizers.in_use)
    count = max(quantizer.calibration_rows for quantizer in quantizers.calibrated)
    chosen = sampled(len(train), count, seed).tolist()
    rows: list[list[int]] = [train[row].ids for row in chosen]

    def make(folder: Path) -> None:
        model = load_model(
            base,
            Model(name=base.name),
            Quantizers(NoQuantization()),
            weight_dtype=file_dtype(base.path),
            compute_dtype=torch.float32,  # the same weights, whatever dtype a run computes in
            device=torch.device("cpu"),  # blocks move to `device` one at a time
        )
        errors = quantize_by_inputs(
            model,
            quantizers,
            rows,
            device,
            lambda done, total: on_event(Progress("quantizing", done, total, unit="blocks")),
        )
        base.check_unchanged()
        save_quantized(model, folder)
        outputs = {name: error._asdict() for name, error in errors.items()}
        write_json(folder / RECORD, {"rows": len(rows), "tokens": sum(map(len, rows)), "output_errors": outputs})

    return replace(base, path=cached("quantized", _key(base, quantizers, rows), make), new_rows=None)


def _key(base: ModelFolder, quantizers: Quantizers, rows: list[list[int]]) -> str:
    """Cache key: a hash of everything that the quantized weights depend on."""
    parts = {
        "base": fingerprint(base.path),
        "section": quantizers.section.model_dump(),
        "modules": [rule.model_dump(include={"match", "quantization"}) for rule in quantizers.modules],
        "rows": rows,
        "algorithm": ALGORITHM,
        **({} if base.new_rows is None else {"new_rows": asdict(base.new_rows)}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

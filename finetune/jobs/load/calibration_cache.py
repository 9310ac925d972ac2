"""A base that is quantized by what its layers see: made once for a base, a section and rows, then kept in the cache."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
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
"""In the folder: the rows' number and tokens, and by layer its outputs' error and that of rounding to nearest."""


def calibrated_base(
    base: ModelFolder,
    quantizers: Quantizers,
    train: TokenizedDataset,
    seed: int,
    device: torch.device,
    on_event: EventHandler,
) -> ModelFolder:
    """The folder of the quantized base, bit for bit the same for every run until it leaves the cache.

    Args:
        base: The model in full precision.
        quantizers: Of its weights, some of which need calibration.
        train: The rows to draw from.
        seed: Of the draw.
        device: Where to compute.
        on_event: Told how far it is.

    Raises:
        FinetuneError: The model cannot be quantized in this way.
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
            compute_dtype=torch.float32,
            device=torch.device("cpu"),
        )
        errors = quantize_by_inputs(
            model,
            quantizers,
            rows,
            device,
            lambda done, total: on_event(Progress("quantizing", done, total, unit="blocks")),
        )
        save_quantized(model, folder)
        outputs = {name: error._asdict() for name, error in errors.items()}
        write_json(folder / RECORD, {"rows": len(rows), "tokens": sum(map(len, rows)), "output_errors": outputs})

    return replace(base, path=cached("quantized", _key(base, quantizers, rows), make))


def _key(base: ModelFolder, quantizers: Quantizers, rows: list[list[int]]) -> str:
    """A name that differs where codes could."""
    parts = {
        "base": fingerprint(base.path),
        "section": quantizers.section.model_dump(),
        "modules": [rule.model_dump(include={"match", "quantization"}) for rule in quantizers.modules],
        "rows": rows,
        "algorithm": ALGORITHM,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

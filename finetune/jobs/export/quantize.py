"""`ft quantize`: a base model with quantized weights, as a folder for `model.name` of recipes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from finetune.errors import ModelError
from finetune.jobs.load.base_record import BaseRecord
from finetune.jobs.load.calibration_cache import RECORD as CALIBRATION
from finetune.jobs.load.context import TrainingContext
from finetune.jobs.load.model_check import check_rules_fit_model
from finetune.models.loading.dtype import file_dtype
from finetune.models.loading.load import load_model
from finetune.models.loading.quantized_checkpoint import check_storable, save_quantized, stored_quantization
from finetune.models.weight_files import weight_files
from finetune.models.writing.unbuilt import UnbuiltTensors
from finetune.quantizers.choice import Quantizers
from finetune.quantizers.layer import QuantizedLinear
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.quantization import NoQuantization
from finetune.run.events import EventHandler, Phase, ignore
from finetune.storage.files import check_output, write_json, written_aside
from finetune.storage.opening import read_json

RECORD = "quantize.json"


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer of the written model.

    Attributes:
        weights: Elements of its weight.
        stored_bytes: Bytes of the stored tensors: codes, scales and minimums.
        weight_error: ||W - Q|| / ||W||, Frobenius norms.
        output_error: ||W X - Q X|| / ||W X|| on the calibration rows; None without calibration.
        nearest_output_error: The same for rounding to nearest.
    """

    weights: int
    stored_bytes: int
    weight_error: float
    output_error: float | None = None
    nearest_output_error: float | None = None


@dataclass(frozen=True)
class QuantizedModel:
    """A quantized model, compared with its base.

    Attributes:
        folder: A model folder for recipes.
        kind: `quantization.kind`.
        layers: By name.
        dtype_before: Type of the weights in the base's files.
        bytes_before: Of the base's weight files.
        bytes_after: Of the written ones.
        unbuilt: Tensors of the base that its class does not build.
    """

    folder: Path
    kind: str
    layers: dict[str, QuantizedLayer]
    dtype_before: torch.dtype
    bytes_before: int
    bytes_after: int
    unbuilt: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """Sums and means over layers, then every layer."""
        layers = list(self.layers.values())
        bits = 8 * sum(layer.stored_bytes for layer in layers) / sum(layer.weights for layer in layers)
        return {
            "kind": self.kind,
            "layer_count": len(layers),
            "bits_per_weight_before": 8 * self.dtype_before.itemsize,
            "bits_per_weight": bits,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "unbuilt": self.unbuilt,
            "weight_error": _mean([layer.weight_error for layer in layers]),
            "output_error": _mean([layer.output_error for layer in layers]),
            "nearest_output_error": _mean([layer.nearest_output_error for layer in layers]),
            "layers": {name: asdict(layer) for name, layer in self.layers.items()},
        }


def quantize(recipe: Recipe, output: Path, overwrite: bool = False, on_event: EventHandler = ignore) -> QuantizedModel:
    """Write the recipe's base, quantized as its section `quantization` says, with its tokenizer.

    Args:
        recipe: Its data are read only if the kind needs calibration.
        output: Folder to write.
        overwrite: Replace an existing folder.
        on_event: Receives an event at every phase.

    Raises:
        RefusedError: The folder exists.
        ModelError: The base is quantized already.
        UnsupportedError: The kind has no format on disk, or does not support the model.
    """
    target = output.absolute()
    check_output(target, overwrite, is_folder=True)
    context = TrainingContext.of(recipe, on_event)
    check_storable(context.quantizers.in_use)
    if stored_quantization(context.folder):
        raise ModelError(
            "the model's weights are quantized already",
            where=str(context.folder.path),
            hint="name the unquantized model in model.name",
        )
    check_rules_fit_model(context.section, context.folder, context.quantizers)
    if context.quantizers.calibrated:
        context.read_checked_data(on_event)
    dtype = file_dtype(context.folder.path)
    unbuilt = UnbuiltTensors.of(context.folder, context.section)
    model = context.load_base(on_event, dtype)
    with written_aside(target) as folder:
        on_event(Phase("writing"))
        save_quantized(model, folder)
        unbuilt.append_to(folder)
        unbuilt.check_carried(folder)
        context.tokenizer.save_pretrained(folder)
        on_event(Phase("measuring errors"))
        result = QuantizedModel(
            folder=target,
            kind=recipe.quantization.kind,
            layers=_measured(context, model, dtype, on_event),
            dtype_before=dtype,
            bytes_before=_weight_bytes(context.folder.path),
            bytes_after=_weight_bytes(folder),
            unbuilt=unbuilt.report(carried=True),
        )
        inputs = {
            "base": BaseRecord.of(context.folder).summary,
            "quantization": recipe.quantization.model_dump(),
            "modules": [rule.model_dump() for rule in recipe.modules],
        }
        context.folder.check_unchanged()  # errors were measured beside weights that were read once more
        write_json(folder / RECORD, {**inputs, **result.to_json()})
    return result


@torch.no_grad()
def _measured(
    context: TrainingContext, model: PreTrainedModel, dtype: torch.dtype, on_event: EventHandler
) -> dict[str, QuantizedLayer]:
    """Every quantized layer, compared with its weight in the base's files."""
    plain = load_model(
        context.folder,
        context.recipe.model,
        Quantizers(NoQuantization()),
        weight_dtype=dtype,
        compute_dtype=dtype,
        device=torch.device("cpu"),
    )
    record = context.base_folder(on_event).path / CALIBRATION
    outputs = read_json(record)["output_errors"] if record.is_file() else {}
    layers = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        stored = plain.get_submodule(name).weight.float()
        # GPT-2's Conv1D stores (in, out).
        weight_OI = stored.T if layer.stored_transposed else stored
        error_OI = layer.quantizer.dequantize(layer).cpu() - weight_OI
        errors = outputs.get(name, {})
        layers[name] = QuantizedLayer(
            weights=weight_OI.numel(),
            stored_bytes=sum(tensor.nbytes for tensor in layer.packed().values()),
            weight_error=float(error_OI.norm() / weight_OI.norm().clamp(min=1e-30)),
            output_error=errors.get("calibrated"),
            nearest_output_error=errors.get("nearest"),
        )
    return layers


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(folder).files)


def _mean(numbers: list[float] | list[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if known else None

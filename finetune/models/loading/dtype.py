"""In which number type to compute and to store, where a recipe leaves it to the machine."""

from __future__ import annotations

import logging
from functools import reduce
from pathlib import Path

import torch

from finetune.errors import EnvironmentFault
from finetune.models.safetensors_io import stored_tensors
from finetune.recipe.sections.model import Dtype
from finetune.recipe.sections.training import Precision

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The compute type for `training.precision` on `device`.

    Raises:
        EnvironmentFault: float16 is asked for on a CPU, where kernels for it are missing or slow.
    """
    if precision == "float16" and device.type == "cpu":
        raise EnvironmentFault(
            "float16 training needs a GPU", where="training.precision", hint="set it to auto, bfloat16 or float32"
        )
    if precision == "bfloat16" and not _has_bfloat16(device):
        logger.warning(
            "training.precision: this %s emulates bfloat16, which makes it many times slower than %s",
            device.type,
            str(_without_bfloat16(device)).removeprefix("torch."),
        )
    if precision != "auto":
        return DTYPES[precision]
    chosen = torch.bfloat16 if _has_bfloat16(device) else _without_bfloat16(device)
    logger.info("training.precision: auto is %s on this %s", str(chosen).removeprefix("torch."), device.type)
    return chosen


def autocast(device: torch.device, compute: torch.dtype) -> torch.autocast:
    """The context of a forward pass in the compute type, as training runs it."""
    return torch.autocast(device.type, compute, enabled=compute is not torch.float32)


def weight_dtype(dtype: Dtype, compute: torch.dtype, trains_base: bool) -> torch.dtype:
    """The storage type for `model.dtype`: weights that train keep full precision unless the recipe says otherwise."""
    if dtype != "auto":
        return DTYPES[dtype]
    return torch.float32 if trains_base else compute


def file_dtype(folder: Path) -> torch.dtype:
    """The narrowest type that holds every floating-point weight in a folder as it is; float32 at most."""
    found = {stored.dtype for stored in stored_tensors(folder).values()}
    known = [SAFETENSORS_DTYPES[name] for name in found & SAFETENSORS_DTYPES.keys()]
    return reduce(torch.promote_types, known) if known else torch.float32


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Without these instructions bfloat16 products are emulated and slower than float32.
    instructions = torch.cpu.get_capabilities()
    return bool(instructions.get("avx512_bf16") or instructions.get("amx_bf16"))


def _without_bfloat16(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32

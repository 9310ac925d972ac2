"""The choice of dtypes for computing and for storing weights, where a recipe says `auto`."""

from __future__ import annotations

import logging
from functools import reduce
from pathlib import Path

import torch

from finetune.errors import EnvironmentFault
from finetune.models.safetensors_io import SAFETENSORS_DTYPES
from finetune.models.weight_files import weight_files
from finetune.recipe.sections.model import Dtype
from finetune.recipe.sections.training import Precision

logger = logging.getLogger(__name__)

PRECISION = "training.precision"
"""The key of the compute dtype."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes by the names that recipes and commands use."""


def compute_dtype(precision: Precision, device: torch.device, stored: Dtype = "auto") -> torch.dtype:
    """The compute dtype for `training.precision` on `device`.

    Args:
        precision: The recipe's key.
        device: Where the model computes.
        stored: The recipe's `model.dtype`: a CPU's operations do not take float16 and bfloat16 together.

    Raises:
        EnvironmentFault: float16 on a CPU, where kernels for it are missing or slow.
    """
    if precision == "float16" and device.type == "cpu":
        raise EnvironmentFault("float16 needs a GPU", where=PRECISION, hint="set it to auto, bfloat16 or float32")
    if precision == "bfloat16" and not _has_bfloat16(device):
        logger.warning(
            "%s: this %s emulates bfloat16, which makes it many times slower than %s",
            PRECISION,
            device.type,
            dtype_name(_without_bfloat16(device)),
        )
    if precision != "auto":
        return DTYPES[precision]
    is_mixed = stored == "float16" and device.type == "cpu"
    return torch.bfloat16 if _has_bfloat16(device) and not is_mixed else _without_bfloat16(device)


def dtype_name(dtype: torch.dtype) -> str:
    """The name that recipes and commands use."""
    return str(dtype).removeprefix("torch.")


def autocast(device: torch.device, compute: torch.dtype) -> torch.autocast:
    """The autocast context of a forward pass with the compute dtype; disabled for float32."""
    return torch.autocast(device.type, compute, enabled=compute is not torch.float32)


def weight_dtype(dtype: Dtype, compute: torch.dtype, trains_base: bool) -> torch.dtype:
    """The dtype of stored weights for `model.dtype`: trainable ones are float32 unless the recipe says otherwise."""
    if dtype != "auto":
        return DTYPES[dtype]
    return torch.float32 if trains_base else compute


def file_dtype(folder: Path) -> torch.dtype:
    """The narrowest dtype that represents every floating-point weight in a folder exactly; float32 at most."""
    found = {SAFETENSORS_DTYPES.get(stored.dtype) for stored in weight_files(folder).present_tensors().values()}
    known = [dtype for dtype in DTYPES.values() if dtype in found]
    return reduce(torch.promote_types, known) if known else torch.float32


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Without these instructions bfloat16 matmuls are emulated and slower than float32.
    instructions = torch.cpu.get_capabilities()
    return bool(instructions.get("avx512_bf16") or instructions.get("amx_bf16"))


def _without_bfloat16(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32

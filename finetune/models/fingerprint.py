"""A base model's fingerprint: a hash of its weights, independent of folder and file shards, and of its quantization."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from finetune.models.fsdp import full_tensor
from finetune.models.safetensors_io import StoredTensor, tensors_in
from finetune.models.weight_files import stored_tensors
from finetune.quantizers.base import is_quantized
from finetune.quantizers.bits_and_bytes import CudaFourBitQuantizer
from finetune.quantizers.layer import QuantizedLinear
from finetune.storage.opening import open_to_read

SAMPLE_BYTES = 4096
SAMPLES_PER_TENSOR = 16


def fingerprint(folder: Path) -> str:
    """A sha256 over the tensors of a model's folder; see `ModelFingerprint`.

    Raises:
        ModelError: The folder has no usable weights.
    """
    return ModelFingerprint.of(stored_tensors(folder)).digest


def fingerprint_files(files: Iterable[Path]) -> str:
    """The same over every tensor of some files; of tensors with the same name, the last one counts.

    Raises:
        ValueError: A file is damaged.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        found |= tensors_in(file)
    return ModelFingerprint.of(found).digest


class ModelFingerprint(NamedTuple):
    """A sha256 over every tensor's name, dtype, shape and 16 samples of 4 KiB spread evenly over its bytes.

    Sampling keeps it at about a second for a model of tens of gigabytes. Fine-tuning changes nearly every weight, so a
    changed model differs in the samples. A tensor of up to 64 KiB is read in full.

    Attributes:
        digest: Of all tensors, whatever files they are in.
        files: The first characters of the digest of each file's tensors, by the file's name.
    """

    digest: str
    files: dict[str, str]

    @classmethod
    def of(cls, stored: Mapping[str, StoredTensor]) -> ModelFingerprint:
        """The fingerprint of stored tensors, by name."""
        tensors = {name: _digest(name, each) for name, each in stored.items()}
        by_file: dict[str, dict[str, str]] = {}
        for name, each in stored.items():
            by_file.setdefault(each.file.name, {})[name] = tensors[name]
        return cls(_combined(tensors), {file: _combined(own)[:16] for file, own in by_file.items()})


def _digest(name: str, stored: StoredTensor) -> str:
    digest = hashlib.sha256(f"{name} {stored.dtype} {list(stored.shape)}".encode())
    with open_to_read(stored.file) as stream:
        for offset in _sample(stored.start, stored.end):
            stream.seek(offset)
            digest.update(stream.read(min(SAMPLE_BYTES, stored.end - offset)))
    return digest.hexdigest()


def _combined(tensors: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()


def fingerprint_quantized(model: nn.Module) -> str | None:
    """A sha256 over the packed tensors of all quantized layers, each sampled as above; None if no layer is quantized.

    It does not depend on adapters, on the compute dtype, or on sharding. Collective for a sharded model: every rank
    must call this.
    """
    return fingerprint_layers(layer for layer in model.modules() if is_quantized(layer))


def fingerprint_layers(layers: Iterable[Any]) -> str | None:
    """`fingerprint_quantized` over quantized layers that are loaded one at a time, in the order of their model."""
    digest, found = hashlib.sha256(), False
    for layer in layers:
        found = True
        if isinstance(layer.quantizer, CudaFourBitQuantizer):
            layer = layer.quantizer.repacked(layer)  # the same hash on a GPU and on a CPU
        tensors = layer.packed() if isinstance(layer, QuantizedLinear) else {"weight": layer.weight}
        for name, tensor in ((name, full_tensor(tensor)) for name, tensor in tensors.items()):
            content = tensor.detach().contiguous().flatten().view(torch.uint8)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            for offset in _sample(0, content.numel()):
                digest.update(content[offset : offset + SAMPLE_BYTES].cpu().numpy().tobytes())
    return digest.hexdigest() if found else None


def _sample(start: int, end: int) -> list[int]:
    """Offsets of the samples to read, including the first and the last bytes."""
    last = end - SAMPLE_BYTES
    if end - start <= SAMPLE_BYTES * SAMPLES_PER_TENSOR:
        return list(range(start, end, SAMPLE_BYTES))
    return [start + (last - start) * index // (SAMPLES_PER_TENSOR - 1) for index in range(SAMPLES_PER_TENSOR)]

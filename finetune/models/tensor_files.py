"""Tensors in the safetensors files of a folder, read and written one at a time and never mapped.

A mapped file counts in full against a limit on the address space, and its pages count as the process's memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

SHARD_BYTES = 2 << 30
"""Most that one file holds, but for a single tensor that is larger."""

INDEX = "model.safetensors.index.json"


class StoredTensor(NamedTuple):
    """A tensor in a file.

    Attributes:
        file: The file.
        dtype: As safetensors names it.
        shape: Of the tensor.
        start: Offset of its first byte in the file.
        end: Offset behind its last one.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        content = torch.empty(self.end - self.start, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.start)
            view, done = memoryview(content.numpy()), 0
            while done < len(view):
                count = stream.readinto(view[done:])
                if not count:
                    raise EOFError(f"{self.file} ends before the tensor that its header announces")
                done += count
        return content.view(DTYPES[self.dtype]).view(self.shape)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor in the safetensors files of a folder, by name."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
            found[name] = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), start, end)
    return found


class Planned(NamedTuple):
    """A tensor that is to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes that it takes."""
        return self.dtype.itemsize * prod(self.shape)


class TensorWriter:
    """Puts tensors in their places, in any order; made by `tensor_writer`."""

    def __init__(self, places: Mapping[str, tuple[BinaryIO, int, Planned]]) -> None:
        self._places = places
        self.missing = set(places)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, in the type that was planned for it."""
        stream, offset, planned = self._places[name]
        assert tuple(tensor.shape) == planned.shape, f"{name}: {tuple(tensor.shape)} is not {planned.shape}"
        content = tensor.detach().to("cpu", planned.dtype).contiguous()
        stream.seek(offset)
        stream.write(memoryview(content.flatten().view(torch.uint8).numpy()))
        self.missing.discard(name)


@contextmanager
def tensor_writer(folder: Path, planned: Mapping[str, Planned]) -> Iterator[TensorWriter]:
    """Lay out the files of a model, as transformers looks for them, for tensors that come later.

    Args:
        folder: Where to write; there is an index where one file does not hold all.
        planned: Every tensor, by name; each must have been put when the block ends.
    """
    shards: list[dict[str, Planned]] = [{}]
    for name, plan in planned.items():
        if shards[-1] and sum(each.bytes for each in shards[-1].values()) + plan.bytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = plan
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    with ExitStack() as stack:
        places: dict[str, tuple[BinaryIO, int, Planned]] = {}
        for file, shard in zip(names, shards, strict=True):
            stream = stack.enter_context((folder / file).open("wb"))
            places |= _lay_out(stream, shard)
        writer = TensorWriter(places)
        yield writer
        assert not writer.missing, f"never written: {sorted(writer.missing)}"
    if len(shards) > 1:
        total = sum(plan.bytes for plan in planned.values())
        index = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / INDEX).write_text(text, encoding="utf-8")


def _lay_out(stream: BinaryIO, shard: Mapping[str, Planned]) -> dict[str, tuple[BinaryIO, int, Planned]]:
    """Write a file's header and give it its size; returns where each tensor goes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name, plan in sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize):  # so that each is aligned
        offsets[name] = end
        end += plan.bytes
        header[name] = {
            "dtype": NAMES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)
    stream.truncate(8 + len(text) + end)
    return {name: (stream, 8 + len(text) + offset, shard[name]) for name, offset in offsets.items()}

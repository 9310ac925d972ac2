"""Reading and writing safetensors files, one tensor at a time, without mapping the files.

A mapped file counts in full against a limit on the address space, and its pages count as the process's memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from mmap import mmap
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

SAFETENSORS_DTYPES = {
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
NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

LARGEST_HEADER = 100 << 20
"""Bytes of a header at most, as in the safetensors library."""

SHARD_BYTES = 2 << 30
"""Default size of a file at most."""

INDEX = "model.safetensors.index.json"


def anonymous_mmap(count: int) -> Tensor:
    """`count` bytes of memory outside of the heap: the system gets them back as soon as they are freed.

    The C library would keep freed memory of the heap for later allocations.
    """
    if not count:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(mmap(-1, count), dtype=torch.uint8)


def _buffer(content: Tensor) -> Any:
    return content.numpy()


class StoredTensor(NamedTuple):
    """A tensor in a file.

    Attributes:
        file: The file.
        dtype: Its name in safetensors, such as BF16.
        shape: The tensor's shape.
        start: Offset of its first byte in the file.
        end: Offset behind its last byte.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def read(self) -> Tensor:
        """The tensor, read into newly allocated memory."""
        content = anonymous_mmap(self.end - self.start)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.start)
            view, done = memoryview(_buffer(content)), 0
            while done < len(view):  # an unbuffered read returns 2 GiB at most
                count = stream.readinto(view[done:])
                if not count:
                    raise EOFError(f"{self.file} ends before the tensor that its header announces")
                done += count
        return content.view(SAFETENSORS_DTYPES[self.dtype]).view(self.shape)

    def rows(self, first: int, end: int) -> StoredTensor:
        """Rows `first` to `end` (exclusive) of it."""
        row_bytes = (self.end - self.start) // self.shape[0]
        start = self.start + first * row_bytes
        return self._replace(shape=(end - first, *self.shape[1:]), start=start, end=start + (end - first) * row_bytes)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor in the safetensors files of a folder, by name."""
    found: dict[str, StoredTensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= tensors_in(file)
    return found


def tensors_in(file: Path) -> dict[str, StoredTensor]:
    """Every tensor in a safetensors file, by name.

    Raises:
        ValueError: The header is damaged, or does not match the file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start_of_file = stream.read(8)
        header_bytes = int.from_bytes(start_of_file, "little")
        if len(start_of_file) < 8 or header_bytes > min(size - 8, LARGEST_HEADER):
            raise ValueError("its header is truncated, or it is no safetensors file")
        try:
            header = json.loads(stream.read(header_bytes))
            header.pop("__metadata__", None)
            found = {name: _stored(file, 8 + header_bytes, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"its header cannot be read: {error}") from error
    # Tensors must fill the file without gaps or overlaps, as the format demands.
    end = 8 + header_bytes
    for name, stored in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        if stored.start != end or stored.end < end:
            raise ValueError(f"the tensor {name} does not begin where the one before it ends")
        end = stored.end
    if end != size:
        raise ValueError(f"it has {size} bytes, and its header announces {end}")
    return found


def _stored(file: Path, offset: int, entry: Any) -> StoredTensor:
    start, end = (offset + int(each) for each in entry["data_offsets"])
    shape = tuple(int(size) for size in entry["shape"])
    dtype = SAFETENSORS_DTYPES.get(entry["dtype"])  # None: a dtype that is not read here
    if dtype is not None and dtype.itemsize * prod(shape) != end - start:
        raise ValueError(f"{end - start} bytes are not {entry['dtype']} of the shape {shape}")
    return StoredTensor(file, str(entry["dtype"]), shape, start, end)


class Planned(NamedTuple):
    """Dtype and shape of a tensor that will be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * prod(self.shape)


class TensorWriter:
    """Writes tensors at their offsets in the files, in any order; constructed by `tensor_writer`.

    Attributes:
        missing: Names of the tensors that are not written yet.
    """

    def __init__(self, offsets: Mapping[str, tuple[BinaryIO, int, Planned]]) -> None:
        self._offsets = offsets
        self.missing = set(offsets)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, in its planned dtype."""
        stream, offset, planned = self._offsets[name]
        assert tuple(tensor.shape) == planned.shape, f"{name}: {tuple(tensor.shape)} is not {planned.shape}"
        content = tensor.detach().to("cpu", planned.dtype).contiguous()
        stream.seek(offset)
        stream.write(_buffer(content.flatten().view(torch.uint8)))
        self.missing.discard(name)


@contextmanager
def file_writer(file: Path, planned: Mapping[str, Planned]) -> Iterator[TensorWriter]:
    """Write the header of one file and reserve its size; each tensor must be put within the context."""
    with file.open("wb") as stream:
        writer = TensorWriter(_lay_out(stream, planned))
        yield writer
        assert not writer.missing, f"never written: {sorted(writer.missing)}"


@contextmanager
def tensor_writer(
    folder: Path, planned: Mapping[str, Planned], shard_bytes: float | None = None
) -> Iterator[TensorWriter]:
    """Write the headers of a model's files, named as transformers expects, and reserve their sizes.

    Args:
        folder: Where to write; with an index if there is more than one file.
        planned: Every tensor, by name; each must be put within the context.
        shard_bytes: Size of a file at most, unless a single tensor is larger; SHARD_BYTES if None.
    """
    most = SHARD_BYTES if shard_bytes is None else shard_bytes
    shards: list[dict[str, Planned]] = [{}]
    for name, plan in planned.items():
        if shards[-1] and sum(each.bytes for each in shards[-1].values()) + plan.bytes > most:
            shards.append({})
        shards[-1][name] = plan
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    with ExitStack() as stack:
        offsets: dict[str, tuple[BinaryIO, int, Planned]] = {}
        for file, shard in zip(names, shards, strict=True):
            stream = stack.enter_context((folder / file).open("wb"))
            offsets |= _lay_out(stream, shard)
        writer = TensorWriter(offsets)
        yield writer
        assert not writer.missing, f"never written: {sorted(writer.missing)}"
    if len(shards) > 1:
        total = sum(plan.bytes for plan in planned.values())
        index = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / INDEX).write_text(text, encoding="utf-8")


def _lay_out(stream: BinaryIO, shard: Mapping[str, Planned]) -> dict[str, tuple[BinaryIO, int, Planned]]:
    """Write a file's header and set its size; returns each tensor's file and offset."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name, plan in sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize):  # each is aligned then
        offsets[name] = end
        end += plan.bytes
        header[name] = {
            "dtype": NAMES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    stream.write(struct.pack("<Q", len(text)) + text)
    stream.truncate(8 + len(text) + end)
    return {name: (stream, 8 + len(text) + offset, shard[name]) for name, offset in offsets.items()}


def unaliased(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as the safetensors library takes them: contiguous, no two with the same storage.

    Tied weights share a storage, and so do bitsandbytes' code tables.
    """
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if memory in seen else tensor.contiguous()
        seen.add(memory)
    return own

"""Reading and writing safetensors files, one tensor at a time, without mapping the files.

A mapped file counts in full against a limit on the address space, and its pages count as the process's memory.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from mmap import mmap
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from finetune.storage.opening import open_to_read, open_to_write, write_new

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

SUFFIX = ".safetensors"

SINGLE = f"model{SUFFIX}"
"""Name of the file of a model with one file of weights."""

INDEX = f"{SINGLE}.index.json"
"""Name of the index of a model with several."""

COPY_BYTES = 16 << 20
"""Bytes of a tensor that are copied or compared at a time."""


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
        content = anonymous_mmap(self.bytes)
        with open_to_read(self.file) as stream:
            unbuffered = stream.raw
            unbuffered.seek(self.start, os.SEEK_SET)
            view, done = memoryview(_buffer(content)), 0
            while done < len(view):  # an unbuffered read returns 2 GiB at most
                count = unbuffered.readinto(view[done:])
                if not count:
                    raise EOFError(f"{self.file} ends before the tensor that its header announces")
                done += count
        return content.view(SAFETENSORS_DTYPES[self.dtype]).view(self.shape)

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.end - self.start

    @property
    def itemsize(self) -> int:
        """Bytes of an element, by which tensors are aligned in a file."""
        return self.bytes // (prod(self.shape) or 1)

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes in the file, a part at a time.

        Raises:
            EOFError: The file has become shorter.
        """
        with open_to_read(self.file) as stream:
            stream.seek(self.start)
            for start in range(self.start, self.end, COPY_BYTES):
                chunk = memoryview(stream.read(min(COPY_BYTES, self.end - start)))
                if len(chunk) < min(COPY_BYTES, self.end - start):
                    raise EOFError(f"{self.file} ends before the tensor that its header announces")
                yield chunk

    def equals(self, other: StoredTensor) -> bool:
        """Whether another stored tensor has the same dtype, shape and bits."""
        if (self.dtype, self.shape, self.bytes) != (other.dtype, other.shape, other.bytes):
            return False
        return all(ours == theirs for ours, theirs in zip(self.chunks(), other.chunks(), strict=True))

    def rows(self, first: int, end: int) -> StoredTensor:
        """Rows `first` to `end` (exclusive) of it."""
        row_bytes = self.bytes // self.shape[0]
        start = self.start + first * row_bytes
        return self._replace(shape=(end - first, *self.shape[1:]), start=start, end=start + (end - first) * row_bytes)


def tensors_in(file: Path) -> dict[str, StoredTensor]:
    """Every tensor in a safetensors file, by name.

    Raises:
        ValueError: The header is damaged, or does not match the file.
    """
    size = file.stat().st_size
    with open_to_read(file) as stream:
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
    start, end = (offset + _whole(each) for each in entry["data_offsets"])
    shape = tuple(map(_whole, entry["shape"]))
    dtype = SAFETENSORS_DTYPES.get(entry["dtype"])  # None: a dtype that is not read here
    if dtype is not None and dtype.itemsize * prod(shape) != end - start:
        raise ValueError(f"{end - start} bytes are not {entry['dtype']} of the shape {shape}")
    return StoredTensor(file, str(entry["dtype"]), shape, start, end)


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r} is no size")
    return number


class Planned(NamedTuple):
    """Dtype and shape of a tensor that will be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.itemsize * prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize


class Place(NamedTuple):
    """Where a tensor of a file is written.

    Attributes:
        stream: The open file.
        offset: Of its first byte.
        plan: The tensor; a `StoredTensor` is copied bit for bit.
    """

    stream: BinaryIO
    offset: int
    plan: Planned | StoredTensor

    def copy(self) -> bool:
        """Copy the tensor, if it is stored in another file; returns whether it is."""
        if not isinstance(self.plan, StoredTensor):
            return False
        self.stream.seek(self.offset)
        for chunk in self.plan.chunks():
            self.stream.write(chunk)
        return True


class TensorWriter:
    """Writes tensors at their places in the files, in any order; constructed by `tensor_writer`.

    Attributes:
        missing: Names of the tensors that are not written yet.
    """

    def __init__(self, places: Mapping[str, Place]) -> None:
        self._places = places
        self.missing = {name for name, place in places.items() if not place.copy()}

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, in its planned dtype."""
        stream, offset, planned = self._places[name]
        assert isinstance(planned, Planned), f"{name} is copied from another file"
        assert tuple(tensor.shape) == planned.shape, f"{name}: {tuple(tensor.shape)} is not {planned.shape}"
        content = tensor.detach().to("cpu", planned.dtype).contiguous()
        stream.seek(offset)
        stream.write(_buffer(content.flatten().view(torch.uint8)))
        self.missing.discard(name)


@contextmanager
def file_writer(file: Path, planned: Mapping[str, Planned | StoredTensor]) -> Iterator[TensorWriter]:
    """Write the header of one file and reserve its size; each tensor must be put within the context."""
    with open_to_write(file) as stream:
        writer = TensorWriter(_lay_out(stream, planned))
        yield writer
        assert not writer.missing, f"never written: {sorted(writer.missing)}"


@contextmanager
def tensor_writer(
    folder: Path, planned: Mapping[str, Planned | StoredTensor], shard_bytes: float | None = None
) -> Iterator[TensorWriter]:
    """Write the headers of a model's files, named as transformers expects, and reserve their sizes.

    Args:
        folder: Where to write; with an index if there is more than one file.
        planned: Every tensor, by name. One that is stored in another file is copied from there bit for bit; each of the
            others must be put within the context.
        shard_bytes: Size of a file at most, unless a single tensor is larger; SHARD_BYTES if None.
    """
    most = SHARD_BYTES if shard_bytes is None else shard_bytes
    shards: list[dict[str, Planned | StoredTensor]] = [{}]
    for name, plan in planned.items():
        if shards[-1] and sum(each.bytes for each in shards[-1].values()) + plan.bytes > most:
            shards.append({})
        shards[-1][name] = plan
    names = shard_names(len(shards))
    with ExitStack() as stack:
        places: dict[str, Place] = {}
        for file, shard in zip(names, shards, strict=True):
            stream = stack.enter_context(open_to_write(folder / file))
            places |= _lay_out(stream, shard)
        writer = TensorWriter(places)
        yield writer
        assert not writer.missing, f"never written: {sorted(writer.missing)}"
    if len(shards) > 1:
        total = sum(plan.bytes for plan in planned.values())
        write_index(folder, {name: file for file, shard in zip(names, shards, strict=True) for name in shard}, total)


def shard_names(count: int) -> list[str]:
    """Names of a model's files, as transformers expects them."""
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05}-of-{count:05}{SUFFIX}" for number in range(1, count + 1)]


def write_index(folder: Path, file_of: Mapping[str, str], total_bytes: int) -> None:
    """Write the index of a model with several files.

    Args:
        folder: Where to write.
        file_of: The name of each tensor's file, by the tensor's name.
        total_bytes: Of all tensors.
    """
    text = json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": file_of}, indent=2)
    write_new(folder / INDEX, text)


def _lay_out(stream: BinaryIO, shard: Mapping[str, Planned | StoredTensor]) -> dict[str, Place]:
    """Write a file's header and set its size; returns each tensor's place."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name, plan in sorted(shard.items(), key=lambda item: -item[1].itemsize):  # each is aligned then
        offsets[name] = end
        end += plan.bytes
        header[name] = {
            "dtype": plan.dtype if isinstance(plan, StoredTensor) else NAMES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    stream.write(struct.pack("<Q", len(text)) + text)
    stream.truncate(8 + len(text) + end)
    return {name: Place(stream, 8 + len(text) + offset, shard[name]) for name, offset in offsets.items()}


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

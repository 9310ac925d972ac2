"""Checks of a GGUF file before a library reads it.

gguf's reader trusts the file: it loops as often as a count says, and a slice behind the end of the file is empty
without an error. A forged count of a file of 100 bytes would keep it busy for years. So the header is read here first,
and each count, length and offset is compared with the size of the file.

The layout is that of the GGUF specification, versions 2 and 3:

    magic "GGUF", uint32 version, uint64 number of tensors, uint64 number of keys
    per key:    string, uint32 type, value
    per tensor: string, uint32 number of dimensions, uint64 per dimension, uint32 type, uint64 offset
    data, aligned to general.alignment; offsets count from its beginning

A string is a uint64 length and that many bytes. An array is a uint32 type, a uint64 length, and the values.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from finetune.errors import ModelError
from finetune.storage.opening import open_to_read

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}
_ALIGNMENT = "general.alignment"
_BLOCKS = "block_count"
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
_SMALLEST_TENSOR = 8 + 4 + 4 + 8  # bytes of the header of a tensor without name and dimensions
_SMALLEST_KEY = 8 + 4 + 1

_FETCH_AGAIN = "fetch the file again"


class _DamagedError(Exception):
    """What is wrong with the file, in words."""


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    bytes: int
    offset: int


def check_gguf(file: Path) -> int:
    """Check the header of a GGUF file against the file's size.

    Returns:
        The number of weights that it stores: the elements of all tensors.

    Raises:
        ModelError: It is no GGUF file, it ends too early, or a count, a length or an offset is impossible.
        OSError: It cannot be read.
    """
    with open_to_read(file) as stream:
        try:
            return _Header(stream, file.stat().st_size).read()
        except _DamagedError as error:
            raise ModelError(f"the file is damaged: {error}", where=str(file), hint=_FETCH_AGAIN) from error


class _Header:
    """The header of a GGUF file, read once from its beginning."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream = stream
        self.size = size
        self.order = "<"
        self.alignment = 32
        self.blocks = 0

    def read(self) -> int:
        if self._bytes(4) != b"GGUF":
            raise _DamagedError("it does not begin with GGUF")
        if not (version := self._number("I")) & 0xFFFF:  # the other byte order, as gguf's reader recognizes it
            self.order = ">"
            (version,) = struct.unpack(">I", struct.pack("<I", version))
        if version not in (2, 3):
            raise _DamagedError(f"its version is {version}; 2 and 3 are known")
        tensors, keys = self._number("Q"), self._number("Q")
        self._check_count(tensors, _SMALLEST_TENSOR, "tensors")
        self._check_count(keys, _SMALLEST_KEY, "keys")
        for _ in range(keys):
            self._key()
        if self.blocks > tensors:
            raise _DamagedError(f"{_BLOCKS} is {self.blocks}, with {tensors} tensors")
        return self._check_tensors([self._tensor() for _ in range(tensors)])

    def _key(self) -> None:
        name = self._string("the name of a key")
        value = self._value(self._type(name), name)
        if name == _ALIGNMENT:
            if not isinstance(value, int) or value < 1 or value & (value - 1):
                raise _DamagedError(f"{name} is {value}, expected a power of two")
            self.alignment = value
        elif name.endswith(f".{_BLOCKS}"):
            if not isinstance(value, int) or value < 1:
                raise _DamagedError(f"{name} is {value}, expected a number above 0")
            self.blocks = max(self.blocks, value)

    def _type(self, name: str) -> GGUFValueType:
        number = self._number("I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise _DamagedError(f"the type of {name} is {number}, which is none") from None

    def _value(self, kind: GGUFValueType, name: str) -> int | float | None:
        """Read a value; returns it where it is a number."""
        if kind is GGUFValueType.STRING:
            self._string(f"the value of {name}")
        elif kind is GGUFValueType.ARRAY:
            self._array(name)
        else:
            return self._number(_SCALARS[kind])
        return None

    def _array(self, name: str) -> None:
        kind, length = self._type(name), self._number("Q")
        if kind is GGUFValueType.ARRAY:
            raise _DamagedError(f"{name} is an array of arrays")
        if kind is GGUFValueType.STRING:
            self._check_count(length, 8, f"texts in {name}")
            for _ in range(length):
                self._string(f"a text of {name}")
        else:
            size = struct.calcsize(_SCALARS[kind])
            self._check_count(length, size, f"numbers in {name}")
            self.stream.seek(length * size, 1)

    def _tensor(self) -> _Tensor:
        name = self._string("the name of a tensor")
        dimensions = self._number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise _DamagedError(f"the tensor {name} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        number, offset = self._number("I"), self._number("Q")
        try:
            per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
        except (ValueError, KeyError):
            raise _DamagedError(f"the type of the tensor {name} is {number}, which is none") from None
        if shape[0] % per_block:
            raise _DamagedError(f"the rows of the tensor {name} have {shape[0]} values, not a multiple of {per_block}")
        return _Tensor(shape, math.prod(shape) // per_block * block_bytes, offset)

    def _check_tensors(self, tensors: list[_Tensor]) -> int:
        start = -(-self.stream.tell() // self.alignment) * self.alignment
        end = start + max((tensor.offset + tensor.bytes for tensor in tensors), default=0)
        if end > self.size:
            raise _DamagedError(f"it has {self.size} bytes, its tensors end at byte {end}")
        return sum(math.prod(tensor.shape) for tensor in tensors)

    def _string(self, what: str) -> str:
        length = self._number("Q")
        self._check_count(length, 1, f"bytes in {what}")
        return self._bytes(length).decode("utf-8", "replace")

    # `struct` knows no more of a format than its letter, so the number may be a float or a bool.
    def _number(self, letter: str) -> int:
        (value,) = struct.unpack(self.order + letter, self._bytes(struct.calcsize(letter)))
        return int(value) if letter == "?" else value

    def _bytes(self, count: int) -> bytes:
        content = self.stream.read(count)
        if len(content) < count:
            raise _DamagedError("it ends within its header")
        return content

    def _check_count(self, count: int, least_bytes: int, what: str) -> None:
        """Refuse a number of things that the rest of the file cannot hold."""
        if count * least_bytes > self.size - self.stream.tell():
            raise _DamagedError(f"{count:,} {what} do not fit into the file")

"""Which tensors are alive in a computation, found out without their memory.

Tensors of floating-point numbers have shape, type and device and no numbers: PyTorch's fake tensors. Integers and truth
values are real, so that whatever depends on them (which positions are trained, where examples end) has its true shape.
The computation itself is the one that training runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from math import prod
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = 1 << 16
"""Numbers below which a tensor that is made out of nothing is real: scalars, tables and the like."""

_DEVICE = torch.ops.prim.device.default
"""What the core asks of a fake tensor before each operation: half of all that is dispatched."""

_CPU = torch.device("cpu")
_PLACES = ("device", "pin_memory")
"""Arguments that say where a result lies."""

_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)
_FILLING = ("aten::uniform_", "aten::normal_", "aten::zero_", "aten::fill_")


class _Mixed(TorchDispatchMode):
    """Operations on fake tensors and real ones together.

    Args:
        tensors: What makes fake tensors.
    """

    def __init__(self, tensors: FakeTensors) -> None:
        super().__init__()
        self.tensors = tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        if func is _DEVICE:
            return args[0].fake_device
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        if not any(isinstance(tensor, FakeTensor) for tensor in given):
            return self.run_real(func, args, kwargs, given)
        written = _written(func, args, kwargs)
        if written is not None and not isinstance(written, FakeTensor):
            return written  # a real tensor, whose value nobody will know
        if _is_plain(func):
            return self.tensors.run(func, args, kwargs)
        if func in _INDEXING:
            args = args[0], _as_places(args[1]), *args[2:]
        return func(*args, **kwargs)

    def run_real(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """Run one that no fake tensor takes part in; `given` are its tensors."""
        return func(*args, **kwargs)


class Unfilled(_Mixed):
    """In the block new tensors of floating-point numbers are not written to, so that the system gives no memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation; what becomes a parameter is a tensor of its own, which modules can be moved with."""
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten.detach.default and isinstance(made, FakeTensor):
            return self.tensors.like(made)
        return made

    def run_real(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """Run it, if it does not fill a tensor."""
        if func._schema.name in _FILLING and args[0].is_floating_point():
            return args[0]
        if func is torch.ops.aten.zeros.default and _is_large_factory(args, kwargs):
            return torch.ops.aten.empty.memory_format(*args, **kwargs)
        return func(*args, **kwargs)


class MemoryTrace(_Mixed):
    """Counts, in its block, the bytes of the tensors that are alive.

    Args:
        tensors: What makes fake tensors.
        width: The vocabulary: tensors whose last dimension is as long count as logits.

    Attributes:
        live: Bytes of the tensors that were made in the block and are still alive.
        peak: The most that `live` has been.
        logits_at_peak: How much of it was logits.
    """

    def __init__(self, tensors: FakeTensors, width: int = 0) -> None:
        super().__init__(tensors)
        self.live = self.peak = self.logits_at_peak = 0
        self._width, self._logits = width, 0
        self._sizes: dict[int, tuple[int, bool]] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave tensors out of the count that were there before the block."""
        self._sizes |= {tensor.untyped_storage()._cdata: (0, False) for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and count what it has made."""
        made = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in _tensors((made,)):
            self._count(tensor)
        return made

    def run_real(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """Run it; a large tensor that is made out of nothing is a fake one."""
        if not given and _is_large_factory(args, kwargs):
            with self.tensors.mode:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        is_logits = tensor.dim() > 0 and tensor.shape[-1] == self._width
        self._sizes[key] = storage.nbytes(), is_logits
        self.live += storage.nbytes()
        self._logits += storage.nbytes() if is_logits else 0
        if self.live > self.peak:
            self.peak, self.logits_at_peak = self.live, self._logits
        finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        size, is_logits = self._sizes.pop(key)
        self.live -= size
        self._logits -= size if is_logits else 0


class FakeTensors:
    """Makes tensors without memory that pass for those of a device.

    Attributes:
        mode: PyTorch's, which the tensors belong to.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def like(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape and type on the CPU, without memory."""
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(self.mode, meta, torch.device("cpu"))

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation of which `_is_plain` holds, on fake tensors or with real ones among them.

        What PyTorch has for tensors on the meta device tells shapes and types. Its mode for fake tensors does the same
        with checks and a memory that nothing here needs, and takes several times as long.
        """
        args = self._without_numbers(args)
        kwargs = {name: self._without_numbers(value) for name, value in kwargs.items() if name not in _PLACES}
        with in_kernel_invocation_manager(self.mode):
            made = func(*args, **kwargs)
        if isinstance(made, (tuple, list)):
            return type(made)(map(self._faked, made))
        return self._faked(made)

    def _without_numbers(self, given: Any) -> Any:
        if isinstance(given, Tensor):
            return given if isinstance(given, FakeTensor) else self.like(given)
        return type(given)(map(self._without_numbers, given)) if isinstance(given, (tuple, list)) else given

    def _faked(self, made: Any) -> Any:
        is_new = isinstance(made, Tensor) and not isinstance(made, FakeTensor)
        return FakeTensor(self.mode, made, _CPU) if is_new else made

    def to_placeholders(self, model: nn.Module, vectors_too: bool) -> None:
        """Put tensors without memory in the place of a model's parameters, and of its buffers on the meta device.

        Args:
            model: Changed in place; shared weights stay shared.
            vectors_too: Whether parameters of one dimension are among them. Those on the meta device become ones
                otherwise, for whoever has to look at what a norm computes.
        """
        made: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is None or isinstance(parameter, FakeTensor):
                    continue
                if id(parameter) not in made:
                    made[id(parameter)] = self._hollow(parameter, vectors_too)
                module._parameters[name] = made[id(parameter)]
            for name, buffer in list(module._buffers.items()):
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = self.like(buffer)

    def _hollow(self, parameter: nn.Parameter, vectors_too: bool) -> nn.Parameter:
        is_float_vector = parameter.dim() <= 1 and parameter.is_floating_point()
        if is_float_vector and not vectors_too:
            data = torch.ones(parameter.shape, dtype=parameter.dtype)
        else:
            data = self.like(parameter.data)
        return nn.Parameter(data, requires_grad=parameter.requires_grad)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors in nested arguments or results of an operation."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _written(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The tensor that an operation writes into, if it does."""
    for place, name in _places_written(func):
        value = args[place] if place < len(args) else kwargs.get(name)
        if isinstance(value, Tensor):
            return value
    return None


@cache
def _places_written(func: Any) -> tuple[tuple[int, str], ...]:
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


@cache
def _is_plain(func: Any) -> bool:
    """Whether an operation's results have shapes and types that follow from those of its arguments, without numbers."""
    needs_numbers = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
    has_shapes = torch._C._dispatch_has_computed_kernel_for_dispatch_key(func.name(), "Meta")
    return func.namespace == "aten" and has_shapes and not needs_numbers


def _as_places(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Indices with numbers in the place of truth values: how many are true must be known."""
    places: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype is torch.bool:
            places += index.nonzero().unbind(1)
        else:
            places.append(index)
    return places


def _is_large_factory(args: Any, kwargs: Any) -> bool:
    """Whether a tensor of many floating-point numbers is made out of nothing."""
    size = args[0] if args else kwargs.get("size", ())
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    is_shape = isinstance(size, (list, tuple)) and all(isinstance(length, int) for length in size)
    return is_shape and prod(size) > SMALL and dtype.is_floating_point

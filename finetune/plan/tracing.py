"""Peak memory and FLOPs of a computation, measured without its memory.

Floating-point tensors are PyTorch's fake tensors: shape, dtype and device without data. Integer and boolean tensors are
real, because shapes depend on their values (positions of target tokens, boundaries of examples). The traced computation
is the one that training runs: a dispatch mode sees each ATen operation, adds the storages that it allocates to the live
bytes, and subtracts each storage when Python frees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from math import prod
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import addmm_flop, baddbmm_flop, flop_registry, sdpa_backward_flop, sdpa_flop

TRACED_ITERATIONS = 3
"""Of a loop over parts: the first two and the last."""

SMALL = 1 << 16
"""Factory functions return real tensors up to this many elements: scalars, tables and the like."""

_DEVICE = torch.ops.prim.device.default
"""Query that PyTorch's core makes on a fake tensor before each operation: half of all dispatched calls."""

_CPU = torch.device("cpu")
_PLACES = ("device", "pin_memory")
"""Arguments for the location of a result."""

_FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten.addmm_: addmm_flop,
    torch.ops.aten.baddbmm_: baddbmm_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
"""FLOPs of an operation from the shapes of its arguments: PyTorch's formulas for matmuls, convolutions and attention on
GPUs. Its registry lacks the in-place matmuls and attention on a CPU."""

_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)
_FILLING = ("aten::uniform_", "aten::normal_", "aten::zero_", "aten::fill_")


class _Mixed(TorchDispatchMode):
    """Runs operations whose arguments mix fake and real tensors.

    Args:
        tensors: Factory of the fake tensors.
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
            return written  # a real tensor with a fake argument: its new values are unknown, and no shape needs them
        if _is_plain(func):
            return self.tensors.run(func, args, kwargs)
        if func in _INDEXING:
            args = args[0], _as_places(args[1]), *args[2:]
        return func(*args, **kwargs)

    def run_real(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """Run an operation without fake arguments; `given` are its tensors."""
        return func(*args, **kwargs)


class Unfilled(_Mixed):
    """Skips the initialization of new floating-point tensors in the block.

    The system commits a page of memory at its first write, so unwritten tensors take none.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation; a detached fake tensor gets its own storage, as parameters of a movable module need."""
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten.detach.default and isinstance(made, FakeTensor):
            return self.tensors.like(made)
        return made

    def run_real(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """Run the operation, unless it fills a floating-point tensor."""
        if func._schema.name in _FILLING and args[0].is_floating_point():
            return args[0]
        if func is torch.ops.aten.zeros.default and _is_large_factory(args, kwargs):
            return torch.ops.aten.empty.memory_format(*args, **kwargs)
        return func(*args, **kwargs)


class MemoryTrace(_Mixed):
    """Counts the bytes of live tensors and the FLOPs of operations in its block.

    FLOPs are those of matmuls, attention and convolutions; a multiply-add counts as two. An operation that is
    recomputed for backward counts again.

    Args:
        tensors: Factory of the fake tensors.
        width: Vocabulary size; a tensor with this last dimension counts as logits.

    Attributes:
        live: Bytes of tensors that were allocated in the block and are still alive.
        peak: Maximum of `live`.
        logits_at_peak: Bytes of logits in `peak`.
        flops: FLOPs of all operations.
        module_flops: FLOPs during the forward pass of the module given to `watch`.
    """

    def __init__(self, tensors: FakeTensors, width: int = 0) -> None:
        super().__init__(tensors)
        self.live = self.peak = self.logits_at_peak = 0
        self.flops = self.module_flops = 0
        self._width, self._logits = width, 0
        self._sizes: dict[int, tuple[int, bool]] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Exclude tensors that were allocated before the block."""
        self._sizes |= {tensor.untyped_storage()._cdata: (0, False) for tensor in tensors}

    def watch(self, module: nn.Module) -> None:
        """Count the FLOPs of this module's forward passes in `module_flops` too."""
        flops_before: list[int] = []
        module.register_forward_pre_hook(lambda *_: flops_before.append(self.flops))
        module.register_forward_hook(lambda *_: self._count_module(flops_before.pop()))

    def shorten(self, iterations: Sequence[Any], size: Callable[[Any], int]) -> Iterator[Any]:
        """Run the first two iterations of a loop and the last, and count the FLOPs of the others.

        The first iteration runs without the tensors of one before it, the second with them, and each of the others
        allocates no more than the one before. Their FLOPs are linear in their size, between the second and the last.
        """
        if len(iterations) <= TRACED_ITERATIONS:
            yield from iterations
            return
        first, second, *others, last = iterations
        yield first
        began = self.flops
        yield second
        of_second = self.flops - began
        yield last
        of_last = self.flops - began - of_second
        smallest, range_ = size(last), size(second) - size(last)
        for each in others:
            self.flops += of_last + ((of_second - of_last) * (size(each) - smallest) // range_ if range_ else 0)

    def _count_module(self, flops_before: int) -> None:
        self.module_flops += self.flops - flops_before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation; count its FLOPs and the tensors that it allocates."""
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if (formula := _FLOP_FORMULAS.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=made)
        for tensor in _tensors((made,)):
            self._count(tensor)
        return made

    def run_real(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """Run the operation; a large tensor of a factory function becomes a fake one."""
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
    """Factory of fake tensors, which have a shape, a dtype and a device but no memory.

    Attributes:
        mode: PyTorch's mode, which the tensors belong to.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def like(self, tensor: Tensor) -> Tensor:
        """A fake tensor of the same shape, strides and dtype on the CPU."""
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(self.mode, meta, torch.device("cpu"))

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation that satisfies `_is_plain`, with at least one fake tensor among its arguments.

        PyTorch's meta kernels compute the result's shape and dtype. `FakeTensorMode` calls the same kernels, with
        checks and a cache that are not needed here, and takes several times as long.
        """
        args = self._without_data(args)
        kwargs = {name: self._without_data(value) for name, value in kwargs.items() if name not in _PLACES}
        with in_kernel_invocation_manager(self.mode):  # fake tensors report the meta device, so meta kernels run
            made = func(*args, **kwargs)
        if isinstance(made, (tuple, list)):
            return type(made)(map(self._faked, made))
        return self._faked(made)

    def _without_data(self, given: Any) -> Any:
        if isinstance(given, Tensor):
            return given if isinstance(given, FakeTensor) else self.like(given)
        return type(given)(map(self._without_data, given)) if isinstance(given, (tuple, list)) else given

    def _faked(self, made: Any) -> Any:
        is_new = isinstance(made, Tensor) and not isinstance(made, FakeTensor)
        return FakeTensor(self.mode, made, _CPU) if is_new else made

    def to_placeholders(self, model: nn.Module, vectors_too: bool) -> None:
        """Replace a model's parameters, and its buffers on the meta device, with fake tensors.

        Args:
            model: Changed in place; tied weights stay tied.
            vectors_too: Whether one-dimensional parameters are replaced too. Otherwise those become real tensors of
                ones, because some code reads the values that a norm computes.
        """
        made: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is None or isinstance(parameter, FakeTensor):
                    continue
                if id(parameter) not in made:
                    made[id(parameter)] = self._placeholder(parameter, vectors_too)
                module._parameters[name] = made[id(parameter)]
            for name, buffer in list(module._buffers.items()):
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = self.like(buffer)

    def _placeholder(self, parameter: nn.Parameter, vectors_too: bool) -> nn.Parameter:
        is_float_vector = parameter.dim() <= 1 and parameter.is_floating_point()
        if is_float_vector and not vectors_too:
            data = torch.ones(parameter.shape, dtype=parameter.dtype)
        else:
            data = self.like(parameter.data)
        return nn.Parameter(data, requires_grad=parameter.requires_grad)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors in nested arguments or results of an operation."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _written(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The argument that an operation writes into; None if it writes into none."""
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
    """Whether the shapes and dtypes of an operation's results depend on those of its arguments alone, not on values."""
    needs_values = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
    has_shapes = torch._C._dispatch_has_computed_kernel_for_dispatch_key(func.name(), "Meta")
    return func.namespace == "aten" and has_shapes and not needs_values


def _as_places(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Indices with boolean masks replaced by positions: a result's shape depends on the number of true values."""
    places: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype is torch.bool:
            places += index.nonzero().unbind(1)
        else:
            places.append(index)
    return places


def _is_large_factory(args: Any, kwargs: Any) -> bool:
    """Whether a factory function is called for a large floating-point tensor."""
    size = args[0] if args else kwargs.get("size", ())
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    is_shape = isinstance(size, (list, tuple)) and all(isinstance(length, int) for length in size)
    return is_shape and prod(size) > SMALL and dtype.is_floating_point

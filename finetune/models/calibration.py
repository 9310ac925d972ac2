"""Calibrated quantization (OPTQ): one decoder block after another, on the outputs of the quantized blocks before it.

Only one block at a time is in float32, beside its inputs on all calibration rows. The other weights stay in the mapped
file until their block is quantized. Memory does not grow with the model's depth.

Shape legend: T tokens of a row, D width of the model, O out_features, I in_features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune.errors import ModelError, UnsupportedError
from finetune.malloc import HeapTrimmer
from finetune.models.linear_layers import list_of_blocks, shape_of
from finetune.quantizers.base import Quantizer
from finetune.quantizers.layer import PackedQuantizer
from finetune.quantizers.on_load import quantizable_layers, replacement
from finetune.quantizers.optq import Hessian, OptqQuantizer

logger = logging.getLogger(__name__)

Choose = Callable[[str], Quantizer | None]
"""Maps a linear layer's name to its quantizer; None leaves the layer unquantized."""

PROBE_TOKENS = 16
"""Tokens of the row on which `_Chain.check` runs."""


class OutputError(NamedTuple):
    """Relative error of a quantized layer's outputs on the calibration rows.

    Attributes:
        calibrated: ||W X - Q X|| / ||W X|| with the calibrated codes Q, Frobenius norms.
        nearest: The same with round-to-nearest codes.
    """

    calibrated: float
    nearest: float


@torch.no_grad()
def quantize_by_inputs(
    model: PreTrainedModel,
    choose: Choose,
    rows: Sequence[list[int]],
    device: torch.device,
    report_blocks: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, OutputError]:
    """Quantize the linear layers in the blocks of `model`, in place.

    Blocks are quantized in their order, and the layers of a block in the order in which they run. Layers with the same
    input share one Hessian. A layer's inputs are computed with all layers before it quantized ("true sequential" in the
    authors' code). Layers that no row reaches (experts) are rounded to nearest.

    Args:
        model: Unquantized, on the CPU, in the dtypes of its files; stays there.
        choose: The quantizer of each layer; quantizers without calibration may be among them.
        rows: Calibration rows, token ids; each row runs alone, without padding.
        device: Where to compute, in float32.
        report_blocks: Called with the number of finished blocks and the number of blocks.

    Returns:
        The output error of each calibrated layer, by name.

    Raises:
        UnsupportedError: The blocks are not a chain, or the quantizer does not support one of the layers.
        ModelError: A layer's inputs are not finite.

    Source: Frantar et al. 2023, arXiv 2210.17323, section 4, "Setup".
    """
    chain = _Chain.of(model)
    replacements = _replacements(model, choose)
    _quantize_outside(model, chain, replacements)
    identity = chain.check(rows[0][:PROBE_TOKENS])
    hidden, others = chain.inputs(rows, device, identity)
    errors: dict[str, OutputError] = {}
    freed = HeapTrimmer()
    for index, module in enumerate(chain.blocks):
        block = _CalibratedBlock(module, hidden, [others_of_row[index] for others_of_row in others])
        linears = chain.linears(model, index)
        with _in_full_precision(_tensors(module), device):
            quantized, errors_of_block = _quantize_block(block, linears, replacements)
            # The layers hold dequantized weights now: these outputs are the next block's inputs.
            for row, output in enumerate(block.outputs()):
                hidden[row] = _hidden_of(output)
        errors |= errors_of_block
        for name, layer in quantized.items():
            model.set_submodule(name, layer.to("cpu"))
            freed.count(linears[name].weight)  # type: ignore[arg-type]
        report_blocks(index + 1, len(chain.blocks))
    return errors


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


class _OtherArguments(NamedTuple):
    """The arguments of a block beside its hidden states, such as masks and position embeddings."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _OtherArguments]:
        """The hidden states of a call, and its other arguments."""
        if args:
            return args[0], cls(args[1:], kwargs)
        return kwargs["hidden_states"], cls((), {key: value for key, value in kwargs.items() if key != "hidden_states"})


class _BlockCall(NamedTuple):
    """Inputs and output of one call of a block."""

    hidden_1TD: Tensor
    others: _OtherArguments
    output: Any


class _Chain(NamedTuple):
    """The blocks of a model, each of which takes the output of the one before.

    Attributes:
        name: Of the `ModuleList` in the model.
        blocks: The blocks.
        decoder: The model without its head, from token ids to hidden states.
    """

    name: str
    blocks: nn.ModuleList
    decoder: nn.Module

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Chain:
        """The chain in the outermost `ModuleList` with most of the linear layers.

        Raises:
            UnsupportedError: There is no such list.
        """
        name = list_of_blocks(model, quantizable_layers(model))
        if name is None:
            raise _unsupported(f"no list of blocks is found in this model ({model.config.model_type})")
        blocks = model.get_submodule(name)
        assert isinstance(blocks, nn.ModuleList)
        return cls(name, blocks, model.base_model)

    def linears(self, model: PreTrainedModel, index: int) -> dict[str, nn.Module]:
        """The linear layers of one block by their full names."""
        prefix = f"{self.name}.{index}."
        return {name: layer for name, layer in quantizable_layers(model).items() if name.startswith(prefix)}

    def check(self, ids: list[int]) -> Callable[[Tensor], Any]:
        """Check that each block takes the output of the one before, and no other argument that depends on a block.

        Then the other arguments can be captured once, with blocks that compute nothing (`inputs`). The check is two
        forward passes of a short row, with the real blocks and with identity blocks in their place: the hidden states
        must be handed from block to block, and the other arguments must be the same in both passes.

        Args:
            ids: A short row.

        Returns:
            An identity block: maps hidden states to the output of a block that leaves them unchanged.

        Raises:
            UnsupportedError: The blocks are not such a chain.
        """
        device = torch.device("cpu")
        real = self._capture_block_calls(ids, device)
        is_tuple = isinstance(real[0].output, tuple)

        def identity(hidden_1TD: Tensor) -> Any:
            return (hidden_1TD,) if is_tuple else hidden_1TD

        skipped = self._capture_block_calls(ids, device, identity)
        is_chain = (
            len(real) == len(skipped) == len(self.blocks)
            and all(torch.equal(_hidden_of(one.output), after.hidden_1TD) for one, after in pairwise(real))
            and all(_same(one.others, other.others) for one, other in zip(real, skipped, strict=True))
        )
        if not is_chain:
            raise _unsupported("blocks of this model take more than the output of the block before them")
        return identity

    def inputs(
        self, rows: Sequence[list[int]], device: torch.device, identity: Callable[[Tensor], Any]
    ) -> tuple[list[Tensor], list[list[_OtherArguments]]]:
        """For each row the inputs of the first block, (1, T, D), and the other arguments of each block.

        Blocks are replaced by `identity`, so that only the embeddings are computed.
        """
        in_blocks = {id(tensor) for tensor in _tensors(self.blocks)}
        non_block = [tensor for tensor in _tensors(self.decoder) if id(tensor) not in in_blocks]
        with _in_full_precision(non_block, device):
            calls = [self._capture_block_calls(ids, device, identity) for ids in rows]
        return [of_row[0].hidden_1TD for of_row in calls], [[call.others for call in of_row] for of_row in calls]

    def _capture_block_calls(
        self, ids: list[int], device: torch.device, identity: Callable[[Tensor], Any] | None = None
    ) -> list[_BlockCall]:
        """All calls of blocks in the forward pass of a row; with `identity`, blocks compute that instead.

        Each block's `forward` is replaced during the pass: a hook could record a call, but not skip its computation.
        The assignment on the instance shadows the class's method, and `del` restores that. The captured inputs are
        those behind all hooks of the block (accelerate registers some), which is why `_CalibratedBlock.outputs` must
        not run them again. `_Stop` ends the pass in the last block: the final norm and all that follows is not needed.
        """
        calls: list[_BlockCall] = []

        def capturing(block: nn.Module) -> Callable[..., Any]:
            original = block.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden_1TD, others = _OtherArguments.split(args, kwargs)
                output = original(*args, **kwargs) if identity is None else identity(hidden_1TD)
                calls.append(_BlockCall(hidden_1TD, others, output))
                if block is self.blocks[-1]:
                    raise _Stop
                return output

            return forward

        for block in self.blocks:
            block.forward = capturing(block)  # type: ignore[method-assign]
        try:
            self.decoder(input_ids=torch.tensor([ids], device=device), use_cache=False)
        except _Stop:
            pass
        finally:
            for block in self.blocks:
                del block.forward
        return calls


class _CalibratedBlock(NamedTuple):
    """A block with its inputs on all calibration rows.

    Attributes:
        module: The block.
        hidden: Hidden states of each row, (1, T, D).
        others: The other arguments for each row.
    """

    module: nn.Module
    hidden: list[Tensor]
    others: list[_OtherArguments]

    def outputs(self) -> Iterator[Any]:
        """The block's output for each row; None where a hook has raised `_Stop`."""
        for hidden_1TD, others in zip(self.hidden, self.others, strict=True):
            try:
                # `forward`, not `__call__`: the inputs were captured behind accelerate's hooks, which would run twice.
                yield self.module.forward(hidden_1TD, *others.args, **others.kwargs)
            except _Stop:
                yield None

    def stages(self, linears: dict[str, nn.Module]) -> list[list[str]]:
        """The layers in the order in which they first run; those with the same input tensor are one stage."""
        stages: list[list[str]] = []
        seen: set[str] = set()
        last: Tensor | None = None

        def noting(name: str) -> Callable[[Tensor], None]:
            def note(inputs: Tensor) -> None:
                nonlocal last
                if name in seen:
                    return
                seen.add(name)
                if inputs is not last:
                    stages.append([])
                stages[-1].append(name)
                last = inputs

            return note

        with ExitStack() as hooks:
            for name, layer in linears.items():
                hooks.enter_context(_input_hook(layer, noting(name)))
            for _ in self.outputs():
                if len(seen) == len(linears):  # further rows are needed only for experts that none has reached
                    break
        return stages

    def hessian(self, name: str, layer: nn.Module) -> Hessian:
        """The Hessian of one of the block's layers over its inputs on all rows.

        Raises:
            ModelError: The inputs are not finite.
        """

        def add_and_stop(inputs: Tensor) -> None:
            hessian.add(inputs)
            raise _Stop  # the rest of the block is not needed

        hessian = Hessian(shape_of(layer)[1], self.hidden[0].device)
        with _input_hook(layer, add_and_stop):
            for _ in self.outputs():
                pass
        if not hessian.matrix().isfinite().all():
            raise ModelError(
                "the layer's inputs are not finite on the calibration rows",
                where=name,
                hint="check the model's weights, or choose a quantization.kind that needs no calibration",
            )
        return hessian


def _replacements(model: PreTrainedModel, choose: Choose) -> dict[str, Any]:
    """An empty quantized layer for each linear layer that will be quantized, by name.

    Raises:
        UnsupportedError: A quantizer does not support a layer.
    """
    layers: dict[str, Any] = quantizable_layers(model)
    chosen = {name: quantizer for name in layers if (quantizer := choose(name)) is not None}
    return {
        name: replacement(name, layers[name], _in_torch(quantizer), layers[name].weight.dtype)
        for name, quantizer in chosen.items()
    }


def _quantize_outside(model: PreTrainedModel, chain: _Chain, replacements: dict[str, Any]) -> None:
    """Quantize the linear layers outside of the blocks, except those whose quantizer needs calibration."""
    for name, quantized in replacements.items():
        if name.startswith(f"{chain.name}."):
            continue
        if isinstance(quantized.quantizer, OptqQuantizer):
            logger.warning("%s stays in full precision: calibration goes through %s only", name, chain.name)
            continue
        layer = model.get_submodule(name)
        _fill(quantized, layer, quantized.quantizer.pack(_oriented(layer).float()))
        model.set_submodule(name, quantized)


def _quantize_block(
    block: _CalibratedBlock, linears: dict[str, nn.Module], replacements: dict[str, Any]
) -> tuple[dict[str, nn.Module], dict[str, OutputError]]:
    """Quantize the layers of one block stage by stage.

    The original layers stay in the block until all are done, and compute with their dequantized weights. Unpacking the
    codes for every row would take most of the time.

    Returns:
        The quantized layers, and the output errors of the calibrated ones, both by name.
    """
    quantized = {name: replacements[name] for name in linears if name in replacements}
    errors: dict[str, OutputError] = {}
    reached: set[str] = set()
    for stage in block.stages({name: linears[name] for name in quantized}):
        hessian = block.hessian(stage[0], linears[stage[0]])
        inverse_factor = cache(hessian.inverse_factor)  # once for all layers of the stage, by damping
        for name in stage:
            layer, quantizer = linears[name], quantized[name].quantizer
            weight_OI = _oriented(layer)
            if isinstance(quantizer, OptqQuantizer):
                tensors = quantizer.pack_for_inputs(weight_OI, inverse_factor(quantizer.damping))
                errors[name] = _output_error(hessian, quantizer, weight_OI, tensors)
            else:
                tensors = quantizer.pack(weight_OI)
            _fill(quantized[name], layer, tensors)
            # The following stages, and the next block, are calibrated on the outputs of quantized weights.
            restored_OI = quantizer.unpack(tensors, *weight_OI.shape)
            layer.weight.data = restored_OI.T if isinstance(layer, Conv1D) else restored_OI
        reached.update(stage)
    for name in quantized.keys() - reached:
        _fill(quantized[name], linears[name], quantized[name].quantizer.pack(_oriented(linears[name])))
        logger.warning("no calibration row reaches %s: its weights are rounded to nearest", name)
    return quantized, errors


def _output_error(
    hessian: Hessian, quantizer: OptqQuantizer, weight_OI: Tensor, tensors: dict[str, Tensor]
) -> OutputError:
    norm = max(hessian.output_norm(weight_OI), 1e-30)  # inputs that are all zero
    calibrated, nearest = (
        hessian.output_norm(weight_OI - quantizer.unpack(packed, *weight_OI.shape)) / norm
        for packed in (tensors, quantizer.pack(weight_OI))
    )
    return OutputError(calibrated, nearest)


def _fill(quantized: Any, layer: Any, tensors: dict[str, Tensor]) -> None:
    """Set the packed weight of an empty quantized layer, and the bias of the layer that it replaces."""
    for key, tensor in tensors.items():
        setattr(quantized, key, nn.Parameter(tensor, requires_grad=False) if key == "weight" else tensor)
    quantized.bias = layer.bias


def _in_torch(quantizer: Quantizer) -> PackedQuantizer:
    """The quantizer whose packing is plain PyTorch, also where layers of bitsandbytes are used on CUDA."""
    in_torch = getattr(quantizer, "in_torch", quantizer)
    assert isinstance(in_torch, PackedQuantizer)
    return in_torch


def _oriented(layer: Any) -> Tensor:
    """The weight of a layer as (O, I)."""
    weight_OI: Tensor = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    return weight_OI.detach()


@contextmanager
def _input_hook(layer: nn.Module, call: Callable[[Tensor], None]) -> Iterator[None]:
    """A context in which `call` gets every input of `layer`."""
    handle = layer.register_forward_pre_hook(lambda _, args: call(args[0]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _in_full_precision(tensors: list[Tensor], device: torch.device) -> Iterator[None]:
    """A context with `tensors` on `device`, floating-point ones in float32; then on the CPU in their old dtypes."""
    before = [tensor.dtype for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype)
    try:
        yield
    finally:
        for tensor, dtype in zip(tensors, before, strict=True):
            tensor.data = tensor.data.to("cpu", dtype)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers; tied ones once."""
    return [*module.parameters(), *module.buffers()]


def _hidden_of(output: Any) -> Tensor:
    """The hidden states in the output of a block."""
    hidden_1TD: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden_1TD


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments of a block are equal: tensors element by element, others by `==`."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)


def _unsupported(what: str) -> UnsupportedError:
    return UnsupportedError(what, where="quantization.kind", hint="choose affine or hqq, which need no calibration")

"""Quantizing a model by what its layers see: block after block, each fed by the quantized ones before it.

One block is in full precision at a time, beside its inputs on all rows; the other weights stay in the mapped file until
their turn comes. Memory does not grow with the model's depth.

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
"""From a linear layer's name to its quantizer; None leaves the layer as it is."""

PROBE_TOKENS = 16
"""Tokens of the row on which it is checked that blocks hand on their outputs and nothing else."""


class OutputError(NamedTuple):
    """How far a layer's outputs on the calibration rows are from those of its weight before quantizing.

    Attributes:
        calibrated: ||W X - Q X|| / ||W X||, Frobenius norms.
        nearest: The same for codes that are rounded to nearest.
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
    """Quantize the linear layers in the blocks of `model`, which is changed in place.

    Blocks go in their order, and within a block layers go in the order in which they run; those that share an input go
    together. Each sees what comes out of the layers before it when these are quantized ("true sequential" in the
    authors' code). Layers that no row reaches are quantized without inputs.

    Args:
        model: In full precision on the CPU, in the types of its file; stays there.
        choose: The quantizer of each layer; those that need no inputs may be among them.
        rows: Token ids; each row runs by itself.
        device: Where to compute, in float32.
        report_blocks: Told how many blocks are done, and how many there are.

    Returns:
        By the name of each layer whose codes were made for its inputs.

    Raises:
        UnsupportedError: The model is no chain of blocks, or the quantizer cannot take one of its layers.
        ModelError: A layer's inputs are not finite.

    Source: Frantar et al. 2023, arXiv 2210.17323, section 4, "Setup".
    """
    chain = _Chain.of(model)
    replacements = _replacements(model, choose)
    _quantize_outside(model, chain, replacements)
    hand_on = chain.prove(rows[0][:PROBE_TOKENS])
    hidden, rests = chain.inputs(rows, device, hand_on)
    errors: dict[str, OutputError] = {}
    freed = HeapTrimmer()
    for index, module in enumerate(chain.blocks):
        block = _Block(module, hidden, [rests_of_row[index] for rests_of_row in rests])
        linears = chain.linears(model, index)
        with _in_full_precision(_tensors(module), device):
            quantized, errors_of_block = _quantize_block(block, linears, replacements)
            for row, output in enumerate(block.passes()):
                hidden[row] = _hidden_of(output)
        errors |= errors_of_block
        for name, layer in quantized.items():
            model.set_submodule(name, layer.to("cpu"))
            freed.count(linears[name].weight)  # type: ignore[arg-type]
        report_blocks(index + 1, len(chain.blocks))
    return errors


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


class _Rest(NamedTuple):
    """What a block is given beside its hidden states, such as masks and positions."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _Rest]:
        """The hidden states of a call, and the rest of it."""
        if args:
            return args[0], cls(args[1:], kwargs)
        return kwargs["hidden_states"], cls((), {key: value for key, value in kwargs.items() if key != "hidden_states"})


class _Visit(NamedTuple):
    """One call of a block."""

    hidden_1TD: Tensor
    rest: _Rest
    output: Any


class _Chain(NamedTuple):
    """The blocks of a model that feed each other, and what is around them."""

    name: str
    blocks: nn.ModuleList
    decoder: nn.Module

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Chain:
        """The outermost list of modules that holds most of the linear layers.

        Raises:
            UnsupportedError: There is none.
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

    def prove(self, ids: list[int]) -> Callable[[Tensor], Any]:
        """Make sure that a block gets the output of the one before, and nothing else that depends on what blocks do.

        Args:
            ids: A short row to see it on.

        Returns:
            From hidden states to the output of a block that leaves them as they are.

        Raises:
            UnsupportedError: It gets more.
        """
        device = torch.device("cpu")
        worked = self._passage(ids, device)
        is_tuple = isinstance(worked[0].output, tuple)

        def hand_on(hidden_1TD: Tensor) -> Any:
            return (hidden_1TD,) if is_tuple else hidden_1TD

        passed = self._passage(ids, device, hand_on)
        is_chain = (
            len(worked) == len(passed) == len(self.blocks)
            and all(torch.equal(_hidden_of(one.output), after.hidden_1TD) for one, after in pairwise(worked))
            and all(_same(one.rest, other.rest) for one, other in zip(worked, passed, strict=True))
        )
        if not is_chain:
            raise _unsupported("blocks of this model are given more than the output of the block before them")
        return hand_on

    def inputs(
        self, rows: Sequence[list[int]], device: torch.device, hand_on: Callable[[Tensor], Any]
    ) -> tuple[list[Tensor], list[list[_Rest]]]:
        """For each row the hidden states, (1, T, D), that enter the first block, and what else each block is given.

        Blocks are passed by, so that nothing but embeddings is computed.
        """
        inside = {id(tensor) for tensor in _tensors(self.blocks)}
        around = [tensor for tensor in _tensors(self.decoder) if id(tensor) not in inside]
        with _in_full_precision(around, device):
            passages = [self._passage(ids, device, hand_on) for ids in rows]
        return [visits[0].hidden_1TD for visits in passages], [[visit.rest for visit in visits] for visits in passages]

    def _passage(
        self, ids: list[int], device: torch.device, hand_on: Callable[[Tensor], Any] | None = None
    ) -> list[_Visit]:
        """All calls of blocks for a row, which ends behind the last; with `hand_on` blocks do that and no work."""
        visits: list[_Visit] = []

        def watched(block: nn.Module) -> Callable[..., Any]:
            work = block.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden_1TD, rest = _Rest.split(args, kwargs)
                output = work(*args, **kwargs) if hand_on is None else hand_on(hidden_1TD)
                visits.append(_Visit(hidden_1TD, rest, output))
                if block is self.blocks[-1]:
                    raise _Stop
                return output

            return forward

        for block in self.blocks:
            block.forward = watched(block)  # type: ignore[method-assign]
        try:
            self.decoder(input_ids=torch.tensor([ids], device=device), use_cache=False)
        except _Stop:
            pass
        finally:
            for block in self.blocks:
                del block.forward
        return visits


class _Block(NamedTuple):
    """A block and all that it is given: for each row hidden states, (1, T, D), and the rest."""

    module: nn.Module
    hidden: list[Tensor]
    rests: list[_Rest]

    def passes(self) -> Iterator[Any]:
        """The block's output for each row; None where something has stopped it."""
        for hidden_1TD, rest in zip(self.hidden, self.rests, strict=True):
            try:
                yield self.module.forward(hidden_1TD, *rest.args, **rest.kwargs)  # it was seen past its hooks
            except _Stop:
                yield None

    def stages(self, linears: dict[str, nn.Module]) -> list[list[str]]:
        """The layers in the order in which they first run; those that are given the same tensor stand together."""
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

        with ExitStack() as watch:
            for name, layer in linears.items():
                watch.enter_context(_shown_inputs(layer, noting(name)))
            for _ in self.passes():
                if len(seen) == len(linears):
                    break
        return stages

    def hessian(self, name: str, layer: nn.Module) -> Hessian:
        """Of what one of the block's layers is given on all rows.

        Raises:
            ModelError: It is not finite.
        """

        def add_and_stop(inputs: Tensor) -> None:
            hessian.add(inputs)
            raise _Stop

        hessian = Hessian(shape_of(layer)[1], self.hidden[0].device)
        with _shown_inputs(layer, add_and_stop):
            for _ in self.passes():
                pass
        if not hessian.matrix().isfinite().all():
            raise ModelError(
                "the layer's inputs are not finite on the calibration rows",
                where=name,
                hint="check the model's weights, or choose a quantization.kind that needs no calibration",
            )
        return hessian


def _replacements(model: PreTrainedModel, choose: Choose) -> dict[str, Any]:
    """For each linear layer that is to be quantized, by name, the layer without data that takes its place.

    Raises:
        UnsupportedError: A quantizer cannot take a layer.
    """
    layers: dict[str, Any] = quantizable_layers(model)
    chosen = {name: quantizer for name in layers if (quantizer := choose(name)) is not None}
    return {
        name: replacement(name, layers[name], _in_torch(quantizer), layers[name].weight.dtype)
        for name, quantizer in chosen.items()
    }


def _quantize_outside(model: PreTrainedModel, chain: _Chain, replacements: dict[str, Any]) -> None:
    """Quantize the linear layers that stand in no block, but for those that would need inputs."""
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
    block: _Block, linears: dict[str, nn.Module], replacements: dict[str, Any]
) -> tuple[dict[str, nn.Module], dict[str, OutputError]]:
    """Quantize the layers of one block stage by stage.

    The layers that are there stay for so long and compute with what their codes stand for: unpacking these for every
    row would take most of the time.

    Returns:
        What is to take their place, and by how much the outputs are off of those that needed inputs, both by name.
    """
    quantized = {name: replacements[name] for name in linears if name in replacements}
    errors: dict[str, OutputError] = {}
    reached: set[str] = set()
    for stage in block.stages({name: linears[name] for name in quantized}):
        hessian = block.hessian(stage[0], linears[stage[0]])
        inverse_factor = cache(hessian.inverse_factor)  # once for all of the stage
        for name in stage:
            layer, quantizer = linears[name], quantized[name].quantizer
            weight_OI = _oriented(layer)
            if isinstance(quantizer, OptqQuantizer):
                tensors = quantizer.pack_for_inputs(weight_OI, inverse_factor(quantizer.damping))
                errors[name] = _output_error(hessian, quantizer, weight_OI, tensors)
            else:
                tensors = quantizer.pack(weight_OI)
            _fill(quantized[name], layer, tensors)
            restored_OI = quantizer.unpack(tensors, *weight_OI.shape)
            layer.weight.data = restored_OI.T if isinstance(layer, Conv1D) else restored_OI
        reached.update(stage)
    for name in quantized.keys() - reached:
        _fill(quantized[name], linears[name], quantized[name].quantizer.pack(_oriented(linears[name])))
        logger.warning("no calibration row reaches %s: its weights are quantized without any", name)
    return quantized, errors


def _output_error(
    hessian: Hessian, quantizer: OptqQuantizer, weight_OI: Tensor, tensors: dict[str, Tensor]
) -> OutputError:
    norm = max(hessian.output_norm(weight_OI), 1e-30)
    calibrated, nearest = (
        hessian.output_norm(weight_OI - quantizer.unpack(packed, *weight_OI.shape)) / norm
        for packed in (tensors, quantizer.pack(weight_OI))
    )
    return OutputError(calibrated, nearest)


def _fill(quantized: Any, layer: Any, tensors: dict[str, Tensor]) -> None:
    """Give a layer without data its packed weight, and the bias of the one that it takes the place of."""
    for key, tensor in tensors.items():
        setattr(quantized, key, nn.Parameter(tensor, requires_grad=False) if key == "weight" else tensor)
    quantized.bias = layer.bias


def _in_torch(quantizer: Quantizer) -> PackedQuantizer:
    """On CUDA, too, the form that is nothing but functions of tensors."""
    in_torch = getattr(quantizer, "in_torch", quantizer)
    assert isinstance(in_torch, PackedQuantizer)
    return in_torch


def _oriented(layer: Any) -> Tensor:
    """The weight of a layer as (O, I)."""
    weight_OI: Tensor = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    return weight_OI.detach()


@contextmanager
def _shown_inputs(layer: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Show whatever `layer` is given to `see`."""
    handle = layer.register_forward_pre_hook(lambda _, args: see(args[0]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _in_full_precision(tensors: list[Tensor], device: torch.device) -> Iterator[None]:
    """Have `tensors` on `device`, floating-point ones in float32; afterwards on the CPU, in their types from before."""
    before = [tensor.dtype for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype)
    try:
        yield
    finally:
        for tensor, dtype in zip(tensors, before, strict=True):
            tensor.data = tensor.data.to("cpu", dtype)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, shared ones once."""
    return [*module.parameters(), *module.buffers()]


def _hidden_of(output: Any) -> Tensor:
    """The hidden states of what a block returns."""
    hidden_1TD: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden_1TD


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments of a block are equal: tensors by their numbers, the rest by `==`."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)


def _unsupported(what: str) -> UnsupportedError:
    return UnsupportedError(what, where="quantization.kind", hint="choose affine or hqq, which need no calibration")

"""Bytes of a run by part. What is resident is counted, what passes take is traced on few blocks and extended to all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.adapters.base import AdapterMethod, trainable
from finetune.data.collate import Batch
from finetune.errors import UnsupportedError
from finetune.models.kernels import packed_attention
from finetune.models.kernels.fused import fuse, kernels_on
from finetune.models.kernels.packing_check import takes_packed_attention
from finetune.models.kernels.recompute import saving_everything
from finetune.models.linear_layers import ParameterCount, count_parameters, linear_layers, list_of_blocks
from finetune.models.loading.dtype import autocast
from finetune.models.loading.meta_model import meta_model, with_blocks
from finetune.plan.fake_layers import quantize_shapes
from finetune.plan.speed import layer_shapes
from finetune.plan.tracing import FakeTensors, MemoryTrace, Unfilled
from finetune.quantizers.base import Quantizer
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.training import Checkpointing
from finetune.train.loss import Chunks, chunked_cross_entropy
from finetune.train.noise import embedding_noise
from finetune.train.optimizers import state_bytes
from finetune.train.prepare_model import prepare_model

FEW_BLOCKS = (2, 3)
"""Blocks of the models that passes are traced on. All but the first and last of a model are alike: what one more takes,
every further one takes."""


@dataclass(frozen=True)
class EstimateInputs:
    """All that decides how much memory a run takes, but for its batches.

    Attributes:
        config: Of the model.
        model: The recipe's section.
        choose: From a linear layer's name to its quantizer.
        quantizes_head: Whether the output head may have one.
        weight_dtype: Of weights that are not quantized.
        compute_dtype: Of passes.
        method: What trains.
        total_steps: Of the run.
        optimizer: The recipe's section.
        checkpointing: What is computed again in backward, as the recipe says it.
        noise: On embeddings, if any.
        flattens_rows: Whether rows stand in one line.
        gpu_memory: Bytes of the GPU that the run is for; None for a CPU.
    """

    config: Any
    model: Model
    choose: Callable[[str], Quantizer | None]
    quantizes_head: bool
    weight_dtype: torch.dtype
    compute_dtype: torch.dtype
    method: AdapterMethod
    total_steps: int
    optimizer: Any
    checkpointing: Checkpointing
    noise: float | None
    flattens_rows: bool
    gpu_memory: int | None

    @property
    def on_gpu(self) -> bool:
        """Whether the run is for a GPU."""
        return self.gpu_memory is not None

    @property
    def chunks(self) -> Chunks:
        """How many logits the output head computes at a time there."""
        return Chunks.on(torch.device("cpu")) if self.gpu_memory is None else Chunks.on_gpu(self.gpu_memory)


class Base(NamedTuple):
    """Bytes of a base.

    Attributes:
        weights: All of it.
        block: Parameters of its largest decoder block.
        non_block: Parameters around the blocks.
        buffers: What is no parameter, such as the scales of quantized weights.
    """

    weights: int
    block: int
    non_block: int
    buffers: int


@dataclass(frozen=True)
class ResidentMemory:
    """What is held from step to step, in bytes.

    Attributes:
        base: The base.
        adapter: What the method adds, trained or not.
        gradients: Of what trains.
        optimizer: Moments, and what the method keeps between steps.
        count: Numbers of parameters.
        largest_trained: Bytes of the largest tensor that trains.
        shapes: How many linear layers the base has of each shape, its head left out.
        head: The output head's shape.
    """

    base: Base
    adapter: int
    gradients: int
    optimizer: int
    count: ParameterCount
    largest_trained: int
    shapes: Counter[tuple[int, int]]
    head: tuple[int, int]

    @property
    def weights(self) -> int:
        """Of all of the base."""
        return self.base.weights


@dataclass(frozen=True)
class TransientMemory:
    """What passes take for a moment beside what is resident, in bytes.

    Attributes:
        activations: Of a forward and backward pass, logits not counted.
        logits: And their gradients.
        evaluation: Of a forward pass over held-out rows.
        pinned: Of the machine's memory, in which inputs of a GPU's blocks wait.
    """

    activations: int
    logits: int
    evaluation: int
    pinned: int = 0


def resident(inputs: EstimateInputs) -> ResidentMemory:
    """Count what is held from step to step; no weights are there.

    Raises:
        UnsupportedError: The method or a quantizer cannot take the model.
    """
    plain = meta_model(inputs.config, inputs.model, inputs.weight_dtype)
    vocabulary, width = plain.get_output_embeddings().weight.shape
    model, _, base = _attached(inputs, inputs.config)
    trained = trainable(model)
    sizes = _sizes([*model.parameters(), *model.buffers()])
    kept = {key: size for key, size in _sizes(inputs.method.state(model).values()).items() if key not in sizes}
    return ResidentMemory(
        base=base,
        adapter=sum(sizes.values()) - base.weights,
        gradients=sum(_sizes(trained.values()).values()),
        optimizer=state_bytes(inputs.optimizer, trained.values()) + sum(kept.values()),
        count=count_parameters(model),
        largest_trained=max(parameter.nbytes for parameter in trained.values()),
        shapes=layer_shapes(plain),
        head=(vocabulary, width),
    )


def passes(inputs: EstimateInputs, train: Batch, held_out: Batch | None) -> TransientMemory:
    """Trace a training pass and a held-out one.

    Args:
        inputs: Of the run.
        train: The largest micro-batch.
        held_out: The largest batch of held-out rows, if there are any.

    Raises:
        UnsupportedError: The model's passes cannot be traced.
    """
    blocks = inputs.config.get_text_config().num_hidden_layers
    few, more = FEW_BLOCKS
    if blocks <= more:
        return _traced(inputs, inputs.config, train, held_out)
    try:
        least, most = (_traced(inputs, with_blocks(inputs.config, count), train, held_out) for count in (few, more))
    except UnsupportedError:  # such as targets that name blocks by their numbers
        return _traced(inputs, inputs.config, train, held_out)

    def extended(at_least: int, at_most: int) -> int:
        return at_most + (at_most - at_least) * (blocks - more) // (more - few)

    if inputs.on_gpu and inputs.checkpointing == "offload":
        # One more block keeps no more than its input, and of these all but one are elsewhere.
        input_of_block = (most.activations - least.activations) // (more - few)
        activations = most.activations - (more - 1) * input_of_block
        pinned = blocks * (1 << (input_of_block - 1).bit_length())  # PyTorch pins powers of two
    else:
        activations, pinned = extended(least.activations, most.activations), 0
    return TransientMemory(
        activations=activations,
        logits=most.logits,
        evaluation=extended(least.evaluation, most.evaluation),
        pinned=pinned,
    )


def _traced(inputs: EstimateInputs, config: Any, train: Batch, held_out: Batch | None) -> TransientMemory:
    model, fakes, _ = _attached(inputs, config)
    vocabulary = config.get_text_config().vocab_size
    for parameter in trainable(model).values():
        parameter.grad = torch.empty_like(parameter)

    def trace() -> MemoryTrace:
        before = MemoryTrace(fakes, vocabulary)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        before.ignore([*model.parameters(), *model.buffers(), *gradients])
        return before

    try:
        with trace() as trained:
            with _autocast(inputs), embedding_noise(model, train, inputs.noise):
                loss = chunked_cross_entropy(model.train(), train, inputs.chunks)
            penalty = inputs.method.penalty(model)
            (loss if penalty is None else loss + penalty).backward()
        evaluated = 0
        if held_out is not None:
            with trace() as measured, torch.no_grad(), _autocast(inputs):
                chunked_cross_entropy(model.eval(), held_out, inputs.chunks)
            evaluated = measured.peak
    except (NotImplementedError, RuntimeError, ValueError, AttributeError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedError(
            f"the passes of this model cannot be traced: {reason}",
            where=f"model.name ({config.model_type})",
            hint="run one step, and read its peak: ft train recipe.yaml --set training.max_steps=1",
        ) from error
    return TransientMemory(trained.peak - trained.logits_at_peak, trained.logits_at_peak, evaluated)


def _attached(inputs: EstimateInputs, config: Any) -> tuple[nn.Module, FakeTensors, Base]:
    """The trainable model without memory, what its tensors belong to, and the bytes of its base."""
    model, fakes = meta_model(config, inputs.model, inputs.weight_dtype), FakeTensors()
    dequantizes_in = inputs.compute_dtype if inputs.on_gpu else None
    quantize_shapes(model, inputs.choose, inputs.quantizes_head, inputs.compute_dtype, dequantizes_in)
    fakes.to_placeholders(model, vectors_too=False)
    base = _base(model)

    def attach(model: PreTrainedModel) -> nn.Module:
        with Unfilled(fakes):
            return inputs.method.attach(model, inputs.total_steps)

    attached = prepare_model(
        model,
        inputs.checkpointing,
        kernels=partial(_emulate_kernels, inputs),
        packing=partial(_choose_attention, inputs),
        attach=attach,
    )
    fakes.to_placeholders(attached, vectors_too=True)
    return attached, fakes, base


def _emulate_kernels(inputs: EstimateInputs, model: PreTrainedModel) -> None:
    """Save for backward what the kernels of the run save: compiled blocks and Liger's also save their outputs."""
    is_compiled = inputs.model.kernels == "compiled"
    if is_compiled or (inputs.model.kernels != "plain" and _fuses(inputs)):
        fuse(model)
        if is_compiled or inputs.on_gpu:
            _keep_as_compiled(model)


def _choose_attention(inputs: EstimateInputs, model: PreTrainedModel) -> None:
    if inputs.flattens_rows and inputs.model.attention == "auto" and takes_packed_attention(model.config):
        model.set_attn_implementation(packed_attention.NAME)


def _fuses(inputs: EstimateInputs) -> bool:
    """Whether norms and gated units run fused: on a GPU only by Liger, which is assumed to be as it is here."""
    return not inputs.on_gpu or kernels_on("cuda") is not None


def _keep_as_compiled(model: PreTrainedModel) -> None:
    """Have fused blocks keep what compiled ones do: as little of each function, but its result too."""
    blocks = list_of_blocks(model, linear_layers(model))
    for block in model.get_submodule(blocks).children() if blocks else ():
        block.forward = saving_everything()(block.forward)  # type: ignore[method-assign]


def _base(model: nn.Module) -> Base:
    name = list_of_blocks(model, linear_layers(model))
    blocks = (
        [sum(_sizes(block.parameters()).values()) for block in model.get_submodule(name).children()] if name else [0]
    )
    parameters = _sizes(model.parameters())
    buffers = sum(size for key, size in _sizes(model.buffers()).items() if key not in parameters)
    whole = sum(parameters.values())
    return Base(whole + buffers, max(blocks), whole - sum(blocks), buffers)


def _autocast(inputs: EstimateInputs) -> torch.autocast:
    """As in training; on the CPU, where tensors without memory are."""
    return autocast(torch.device("cpu"), inputs.compute_dtype)


def _sizes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of memory by what tensors lie in, which some share."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in storages}

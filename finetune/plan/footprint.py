"""Memory of a run by part, and FLOPs of its passes.

Tensors that are held between steps are counted from their shapes. Passes are traced on models of two and three blocks,
and extended linearly to the model's own number of blocks.
"""

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
from finetune.models.kernels.float32_compute import compute_in_float32
from finetune.models.kernels.fused import fuse, kernels_on
from finetune.models.kernels.logit_transform import LogitTransform
from finetune.models.kernels.packing_check import takes_packed_attention
from finetune.models.kernels.parts import loops_shortened
from finetune.models.kernels.recompute import saving_everything
from finetune.models.linear_layers import ParameterCount, count_parameters, linear_layers, list_of_blocks
from finetune.models.loading.dtype import autocast
from finetune.models.loading.meta_model import meta_model, with_blocks
from finetune.plan.fake_layers import quantize_shapes
from finetune.plan.speed import PassFlops, layer_shapes
from finetune.plan.tracing import FakeTensors, MemoryTrace, Unfilled
from finetune.quantizers.base import Quantizer
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.training import Checkpointing
from finetune.train.loss import Chunks, chunked_cross_entropy
from finetune.train.noise import embedding_noise
from finetune.train.optimizers import state_bytes
from finetune.train.prepare_model import prepare_model

FEW_BLOCKS = (2, 3)
"""Blocks of the two models that passes are traced on. All blocks but the first and the last cost the same, so the
difference of the two traces is the cost of each further block."""


@dataclass(frozen=True)
class EstimateInputs:
    """Inputs of the memory estimate, except for the batches.

    Attributes:
        config: The model's config.
        model: The recipe's section.
        choose: Maps a linear layer's name to its quantizer, or to None.
        quantizes_head: Whether the output head may be quantized.
        weight_dtype: Dtype of weights that are not quantized.
        compute_dtype: Dtype of the forward and backward passes.
        method: The adapter method, or full fine-tuning.
        total_steps: Optimizer steps of the run.
        optimizer: The recipe's section.
        checkpointing: The recipe's `training.gradient_checkpointing`.
        noise: NEFTune's alpha; None without noise.
        flattens_rows: Whether a micro-batch is one row of packed examples.
        gpu_memory: Bytes of the target GPU; None for a CPU.
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
        """Whether the target is a GPU."""
        return self.gpu_memory is not None

    @property
    def chunks(self) -> Chunks:
        """Logits that the output head computes at a time on the target."""
        return Chunks.on(torch.device("cpu")) if self.gpu_memory is None else Chunks.on_gpu(self.gpu_memory)


class Base(NamedTuple):
    """Bytes of a base.

    Attributes:
        weights: Parameters and buffers.
        block: Parameters of the largest decoder block.
        non_block: Parameters outside of the decoder blocks: embeddings, output head, last norm.
        buffers: Buffers, such as the scales of quantized weights.
    """

    weights: int
    block: int
    non_block: int
    buffers: int


@dataclass(frozen=True)
class ResidentMemory:
    """Memory that is held between steps, in bytes.

    Attributes:
        base: The base.
        adapter: Parameters and buffers that the method adds, trainable or not.
        gradients: Gradients of the trainable parameters.
        optimizer: Moments, and the method's own state.
        count: Numbers of parameters.
        largest_trained: Bytes of the largest trainable parameter.
        shapes: Number of the base's linear layers by shape (O, I), without the output head.
    """

    base: Base
    adapter: int
    gradients: int
    optimizer: int
    count: ParameterCount
    largest_trained: int
    shapes: Counter[tuple[int, int]]

    @property
    def weights(self) -> int:
        """Bytes of the base's parameters and buffers."""
        return self.base.weights


@dataclass(frozen=True)
class PassCosts:
    """Memory that passes take beside the resident memory, in bytes, and their FLOPs.

    Attributes:
        activations: Peak of a forward and backward pass, without logits.
        logits: Logits and their gradients at that peak.
        evaluation: Peak of a forward pass over validation rows.
        flops: FLOPs of the forward and backward pass.
        pinned: Pinned host memory for offloaded inputs of a GPU's blocks.
    """

    activations: int
    logits: int
    evaluation: int
    flops: PassFlops
    pinned: int = 0


def resident(inputs: EstimateInputs) -> ResidentMemory:
    """Count the memory that is held between steps, on a model without weights.

    Raises:
        UnsupportedError: The method or a quantizer does not support the model.
    """
    plain = meta_model(inputs.config, inputs.model, inputs.weight_dtype)
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
    )


def passes(inputs: EstimateInputs, train: Batch, validation: Batch | None) -> PassCosts:
    """Trace a forward and backward pass, and a forward pass over validation rows.

    Args:
        inputs: Inputs of the estimate.
        train: The largest micro-batch.
        validation: The largest batch of validation rows; None without any.

    Raises:
        UnsupportedError: The model's passes cannot be traced.
    """
    blocks = inputs.config.get_text_config().num_hidden_layers
    few, more = FEW_BLOCKS
    if blocks <= more:
        return _traced(inputs, inputs.config, train, validation)
    try:
        least, most = (_traced(inputs, with_blocks(inputs.config, count), train, validation) for count in (few, more))
    except UnsupportedError:  # such as target_modules that contain block numbers beyond these
        return _traced(inputs, inputs.config, train, validation)

    def extended(at_least: int, at_most: int) -> int:
        return at_most + (at_most - at_least) * (blocks - more) // (more - few)

    if inputs.on_gpu and inputs.checkpointing == "offload":
        # A further block saves its input only. Inputs lie in host memory, except for that of the current block.
        input_of_block = (most.activations - least.activations) // (more - few)
        activations = most.activations - (more - 1) * input_of_block
        pinned = blocks * (1 << (input_of_block - 1).bit_length())  # PyTorch pins powers of two
    else:
        activations, pinned = extended(least.activations, most.activations), 0
    return PassCosts(
        activations=activations,
        logits=most.logits,
        evaluation=extended(least.evaluation, most.evaluation),
        flops=PassFlops(extended(least.flops.body, most.flops.body), most.flops.head),
        pinned=pinned,
    )


def _traced(inputs: EstimateInputs, config: Any, train: Batch, validation: Batch | None) -> PassCosts:
    model, fakes, _ = _attached(inputs, config)
    vocabulary, transform = config.get_text_config().vocab_size, LogitTransform.expected(config)
    # Gradients are resident and are added to: without them here, backward would allocate them as transient memory.
    for parameter in trainable(model).values():
        parameter.grad = torch.empty_like(parameter)

    def trace() -> MemoryTrace:
        before = MemoryTrace(fakes, vocabulary)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        before.ignore([*model.parameters(), *model.buffers(), *gradients])
        return before

    try:
        with trace() as trained, loops_shortened(trained.shorten):
            trained.watch(model.get_output_embeddings())  # type: ignore[operator]
            with _autocast(inputs), embedding_noise(model, train, inputs.noise):
                loss = chunked_cross_entropy(model.train(), train, transform, inputs.chunks)
            penalty = inputs.method.penalty(model)
            (loss if penalty is None else loss + penalty).backward()
        evaluated = 0
        if validation is not None:
            with (
                trace() as measured,
                loops_shortened(measured.shorten),
                torch.no_grad(),
                _autocast(inputs),
            ):
                chunked_cross_entropy(model.eval(), validation, transform, inputs.chunks)
            evaluated = measured.peak
    except (NotImplementedError, RuntimeError, ValueError, AttributeError, TypeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedError(
            f"the passes of this model cannot be traced: {reason}",
            where=f"model.name ({config.model_type})",
            hint="run one step, and read its peak: ft train recipe.yaml --set training.max_steps=1",
        ) from error
    flops = PassFlops(trained.flops - trained.module_flops, trained.module_flops)
    return PassCosts(trained.peak - trained.logits_at_peak, trained.logits_at_peak, evaluated, flops)


def _attached(inputs: EstimateInputs, config: Any) -> tuple[nn.Module, FakeTensors, Base]:
    """The trainable model without memory, what its tensors belong to, and the bytes of its base."""
    model, fakes = meta_model(config, inputs.model, inputs.weight_dtype), FakeTensors()
    dequantizes_in = inputs.compute_dtype if inputs.on_gpu else None
    quantize_shapes(model, inputs.choose, inputs.quantizes_head, inputs.compute_dtype, dequantizes_in)
    if inputs.compute_dtype is torch.float32 is not inputs.weight_dtype:
        compute_in_float32(model)
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
    """Whether norms and gated MLPs run fused. A GPU needs Liger, which is assumed to be installed as it is here."""
    return not inputs.on_gpu or kernels_on("cuda") is not None


def _keep_as_compiled(model: PreTrainedModel) -> None:
    """Have fused blocks save the same tensors as compiled ones: the inputs and the output of each function."""
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
    weights = sum(parameters.values())
    return Base(weights + buffers, max(blocks), weights - sum(blocks), buffers)


def _autocast(inputs: EstimateInputs) -> torch.autocast:
    """Training's autocast, but for the CPU, which is the device of fake tensors."""
    return autocast(torch.device("cpu"), inputs.compute_dtype)


def _sizes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by storage: tied weights and views share one."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in storages}

"""Decoder blocks compiled by `torch.compile` for training."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError
from transformers import GradientCheckpointingLayer, PreTrainedModel

from finetune.errors import EnvironmentFault, UnsupportedError
from finetune.models.linear_layers import linear_layers, list_of_blocks
from finetune.storage.cache import cache_folder


def compile_blocks(model: PreTrainedModel) -> str:
    """Compile a model's decoder blocks, lazily, at their first forward pass in training.

    Identical blocks share the compiled code, which takes rows of any length. Three things stay eager:
    - Forward passes without gradients: generation would be compiled for every kind of KV cache.
    - Attention between packed examples, which loops over them.
    - A block whose input needs no gradient, such as the first one under frozen embeddings: for this block alone,
      everything would be compiled a second time.

    Args:
        model: Without an adapter; changed in place.

    Returns:
        A summary for the log.

    Raises:
        EnvironmentFault: This machine has no working compiler.
        UnsupportedError: The model has no list of blocks.
    """
    name = list_of_blocks(model, linear_layers(model))
    if name is None:
        raise UnsupportedError("the model has no list of blocks to compile", where="model.kernels", hint="leave it out")
    # In ft's cache: PyTorch's default is a folder in /tmp that all users of the machine share.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
    torch._dynamo.config.specialize_float = True  # the scale of a LoRA layer is a constant, not a dynamic input
    _try_compiler(next(model.parameters()).device)
    blocks = list(model.get_submodule(name).children())
    for block in blocks:
        block.forward = _compiled_for_training(block)
    return f"{len(blocks)} blocks are compiled in the first steps, which take longer for it"


def _try_compiler(device: torch.device) -> None:
    """Compile a minimal function, so that a missing compiler is reported before the first step."""
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except (InductorError, TorchDynamoException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EnvironmentFault(
            f"nothing can be compiled on this machine: {reason}",
            where="model.kernels",
            hint="install a C++ compiler and Python's headers (Debian: g++ python3-dev), for a GPU triton; "
            "or leave model.kernels out",
        ) from error


def _compiled_for_training(block: nn.Module) -> Callable[..., Any]:
    """A forward pass that is compiled in training and eager otherwise."""
    eager: Any = block.forward
    # `GradientCheckpointingLayer.__init_subclass__` of transformers wraps `forward`; `__wrapped__` is the original. The
    # wrapper must stay outside of the compiled graph.
    unwrapped = (
        MethodType(type(block).forward.__wrapped__, block) if isinstance(block, GradientCheckpointingLayer) else eager
    )
    compiled = torch.compile(unwrapped, dynamic=True)

    @wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not _needs_gradient(*args, *kwargs.values()):
            return eager(*args, **kwargs)
        if block.training and getattr(block, "gradient_checkpointing", False):
            # Checkpointing wraps the compiled function. The other way round, the graph break at attention within the
            # checkpointed region would leave all of it eager.
            recomputed: Any = block._gradient_checkpointing_func
            return recomputed(partial(compiled, **kwargs), *args)
        return compiled(*args, **kwargs)

    return forward


def _needs_gradient(*inputs: Any) -> bool:
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in inputs)

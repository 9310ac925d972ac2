"""Decoder blocks that PyTorch compiles for the passes of training."""

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
    """Have a model's decoder blocks compiled where training first passes through them.

    Blocks that are alike share what is compiled, which takes rows of any length. Passes without gradients stay the
    model's own: those of answers would be compiled for every kind of cache. So does attention between packed examples,
    which goes over them one by one; and a block whose input needs no gradient, as the first one's does where embeddings
    do not train: for it alone, everything would be compiled a second time.

    Args:
        model: Before adapters come; changed in place.

    Returns:
        What was done, in words.

    Raises:
        EnvironmentFault: This machine has nothing to compile with.
        UnsupportedError: The model has no list of blocks.
    """
    name = list_of_blocks(model, linear_layers(model))
    if name is None:
        raise UnsupportedError("the model has no list of blocks to compile", where="model.kernels", hint="leave it out")
    # Beside what else ft makes once, and not in a folder that all users of the machine share.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
    torch._dynamo.config.specialize_float = True  # a LoRA's scale is one number, and not another in every step
    _try_compiler(next(model.parameters()).device)
    blocks = list(model.get_submodule(name).children())
    for block in blocks:
        block.forward = _compiled_for_training(block)
    return f"{len(blocks)} blocks are compiled in the first steps, which take longer for it"


def _try_compiler(device: torch.device) -> None:
    """Compile what is next to nothing, so that what is missing is told before the first step."""
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
    own: Any = block.forward
    once = MethodType(type(block).forward.__wrapped__, block) if isinstance(block, GradientCheckpointingLayer) else own
    compiled = torch.compile(once, dynamic=True)

    @wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not _needs_gradient(*args, *kwargs.values()):
            return own(*args, **kwargs)
        if block.training and getattr(block, "gradient_checkpointing", False):
            # Around what is compiled: within it, nothing would be, for attention leaves the graph.
            recomputed: Any = block._gradient_checkpointing_func
            return recomputed(partial(compiled, **kwargs), *args)
        return compiled(*args, **kwargs)

    return forward


def _needs_gradient(*inputs: Any) -> bool:
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in inputs)

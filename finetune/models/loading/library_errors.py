"""Errors of libraries that build something from a model's files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from finetune.errors import FinetuneError, ModelError, as_out_of_memory


@contextmanager
def errors_as_model_error(where: str) -> Iterator[None]:
    """A context that turns what libraries raise while they build something from a model's folder into a ModelError.

    They raise errors of any class for impossible values in a file. Errors of ft, of the device and of its memory pass.
    """
    try:
        yield
    except FinetuneError:
        raise
    except BaseException as error:
        # `PanicException`, which Rust libraries raise, is no Exception; KeyboardInterrupt passes.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if as_out_of_memory(error) is not None or isinstance(error, torch.AcceleratorError):
            raise
        if isinstance(error, RuntimeError) and "mismatch" in str(error):
            what, hint = (
                "the shapes of the weights do not match config.json",
                "use the config.json that belongs to these weights",
            )
        else:
            what = f"the model cannot be loaded: {first_line(error)}"
            hint = "it must be a causal language model of an architecture that the installed transformers knows"
        raise ModelError(what, where=where, hint=hint) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, after its class where that says more; the class alone without one."""
    text, kind = str(error).strip(), type(error).__name__
    if not text:
        return kind
    line = text.splitlines()[0]
    return line if isinstance(error, ValueError | OSError | ImportError) else f"{kind}: {line}"

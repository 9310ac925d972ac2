"""bitsandbytes is imported without PyTorch's compiler; its decorated functions are compiled when they are called."""

from __future__ import annotations

import subprocess
import sys

import torch

from finetune.quantizers.lazy_compile import _when_called

MODULES = ("bitsandbytes", "torch._inductor.compile_fx")
SCRIPT = f"import sys, finetune.jobs.train.run; print(*(name in sys.modules for name in {MODULES}))"


def test_commands_do_not_import_the_compiler():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_torch_compile_is_restored_after_import():
    assert torch.compile.__module__ == "torch"


def test_decorated_function_is_compiled_once_at_its_first_call():
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    @_when_called(backend=backend)
    def doubled(x: torch.Tensor) -> torch.Tensor:
        """Its words."""
        return 2 * x

    assert not graphs
    assert doubled.__doc__ == "Its words."
    assert [doubled(torch.ones(())).item() for _ in range(2)] == [2, 2]
    assert len(graphs) == 1

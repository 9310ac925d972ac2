"""Cases of `make bench-gpu`: shapes, rows, and what runs in each part. Imports neither PyTorch nor ft."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Kind = Literal["lora", "qlora", "full"]
Side = Literal["ft", "trl"]

LLAMA = {"model_type": "llama", "vocab_size": 128256, "head_dim": 128, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        **LLAMA,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
"""Settings of transformers' config by shape. The weights are random: speed and memory do not depend on them."""

TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""Replaces the sizes of every shape under `--tiny`."""


@dataclass(frozen=True)
class Datasets:
    """Rows of random tokens, and how a step takes them.

    Attributes:
        median: Of a row's length in tokens.
        sigma: Of the logarithm of the length; 0 for rows of one length.
        longest: Of a row, in tokens.
        prompt: Share of a row, from its beginning, that is not trained.
        micro_batch: Rows of a micro-batch.
        accumulation: Micro-batches of a step.
    """

    median: int
    sigma: float
    longest: int
    prompt: float
    micro_batch: int
    accumulation: int = 4

    @property
    def rows_per_step(self) -> int:
        return self.micro_batch * self.accumulation

    def tiny(self) -> Datasets:
        """The same kind of rows in a size for CI."""
        median = 16 if self.sigma else 64
        return replace(self, median=median, longest=64, micro_batch=min(self.micro_batch, 4), accumulation=2)


ROWS = {"4096": Datasets(4096, 0.0, 4096, 0.0, 1), "short": Datasets(150, 0.6, 1024, 0.4, 24)}
"""Full rows, and rows with the lengths of short instructions. A micro-batch of either has about 4,096 tokens."""


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of a run.

    Attributes:
        warm_up: First steps, reported apart: kernels are chosen and compiled in them.
        steady: Those after, of which speed is the median.
        traced: The step, from 1, that runs under the profiler; it is the last one.
    """

    warm_up: int
    steady: int
    traced: int


STEPS = Steps(warm_up=3, steady=6, traced=10)
TINY_STEPS = Steps(warm_up=1, steady=1, traced=2)
"""Under `--tiny` the steady step is the traced one as well."""


@dataclass(frozen=True)
class Case:
    """One measured run.

    Attributes:
        shape: Key of `SHAPES`.
        kind: Method.
        rows: Key of `ROWS`.
        side: Which trainer.
        kernels: `model.kernels` of ft; TRL takes Liger's kernels where they are installed unless this is `plain`.
        checkpointing: `training.gradient_checkpointing` of ft; TRL knows true and false.
        plans: Whether the memory that `ft plan` estimates is recorded beside the measured one.
        keeps_trace: Whether the whole trace is kept beside its summary.
    """

    shape: str
    kind: Kind
    rows: str
    side: Side
    kernels: str = "auto"
    checkpointing: bool | str = False
    plans: bool = False
    keeps_trace: bool = False

    @property
    def name(self) -> str:
        """For file names and tables: distinct within a part."""
        kernels = "" if self.kernels == "auto" else f"-{self.kernels}"
        checkpointing = f"-checkpointing-{self.checkpointing}".lower() if self.checkpointing else ""
        return f"{self.shape}-{self.kind}-{self.rows}{kernels}{checkpointing}-{self.side}"


def beside_trl(shape: str, kind: Kind, rows: str, **settings: Any) -> list[Case]:
    """The same run by ft and by TRL."""
    return [Case(shape, kind, rows, side, **settings) for side in ("ft", "trl")]


PARTS: dict[int, list[Case]] = {
    1: [
        *beside_trl("llama-3.1-8b", "lora", "4096", keeps_trace=True),
        *beside_trl("qwen3-0.6b", "lora", "4096", keeps_trace=True),
        *beside_trl("llama-3.1-8b", "qlora", "4096", keeps_trace=True),
    ],
    2: [
        *beside_trl("qwen3-0.6b", "full", "4096"),
        *beside_trl("llama-3.2-3b", "lora", "4096"),
        *beside_trl("llama-3.2-3b", "lora", "short"),
        *beside_trl("qwen3-0.6b", "lora", "short"),
        *beside_trl("llama-3.2-3b", "full", "4096"),
        *beside_trl("llama-3.2-3b", "qlora", "4096"),
    ],
    3: [
        Case("qwen3-0.6b", "lora", "4096", "ft", kernels="compiled"),
        *beside_trl("qwen3-0.6b", "lora", "4096", kernels="plain"),
        Case("llama-3.2-3b", "full", "4096", "ft", plans=True),
        *beside_trl("llama-3.1-8b", "lora", "4096", checkpointing=True, plans=True),
        Case("llama-3.1-8b", "lora", "4096", "ft", checkpointing="selective", plans=True),
        Case("llama-3.1-8b", "qlora", "4096", "ft", plans=True),
        Case("llama-3.1-8b", "lora", "4096", "ft", checkpointing="offload", plans=True),
        Case("llama-3.1-8b", "lora", "4096", "ft", kernels="compiled"),
    ],
}
"""The most informative cases come first, in the parts and within a part."""

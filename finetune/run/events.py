"""Events of a running job: small records for the terminal, `metrics.jsonl`, `--json` and trackers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Event:
    """Base of all records.

    Attributes:
        kind: Name of the record in JSON.
        json_keys: JSON keys of fields whose name in Python is another one.
    """

    kind: ClassVar[str]
    json_keys: ClassVar[Mapping[str, str]] = {}

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values, kind first; JSON has no NaN or infinity, so they become null."""
        values = {
            self.json_keys.get(name, name): None if _is_non_finite(value) else value
            for name, value in asdict(self).items()
        }
        return {"event": self.kind, **values}


def _is_non_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


@dataclass(frozen=True)
class Phase(Event):
    """A phase of the job has begun."""

    kind: ClassVar[str] = "phase"
    doing: str


@dataclass(frozen=True)
class TrainingStarted(Event):
    """Model and data are loaded; training begins.

    Attributes:
        run_directory: Path of the run.
        model: Name of the base model.
        method: `adapter.method`.
        quantization: `quantization.kind`.
        trainable_parameters: Count of trainable parameters.
        total_parameters: Count of all parameters of model and adapter; quantized ones are counted unpacked.
        train_rows: Rows of the train set.
        validation_rows: Rows of the validation set.
        target_tokens: Target tokens of one epoch.
        total_steps: Optimizer steps of the run.
        compute_dtype: Dtype of the forward pass.
        planned_memory_bytes: Estimated peak memory, as in `ft plan`; None without an estimate.
    """

    kind: ClassVar[str] = "started"
    run_directory: str
    model: str
    method: str
    quantization: str
    trainable_parameters: int
    total_parameters: int
    train_rows: int
    validation_rows: int
    target_tokens: int
    total_steps: int
    compute_dtype: str
    planned_memory_bytes: int | None = None


@dataclass(frozen=True)
class RunResumed(Event):
    """The state of a checkpoint is restored; training resumes with step `step + 1`."""

    kind: ClassVar[str] = "resumed"
    checkpoint: str
    step: int
    total_steps: int


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A checkpoint is committed: the run can resume from it."""

    kind: ClassVar[str] = "saved"
    checkpoint: str
    step: int
    size_bytes: int
    seconds: float


@dataclass(frozen=True)
class DryRunPassed(Event):
    """The dry run passed: one step on the longest rows, a checkpoint and a merged layer, all undone afterwards.

    Attributes:
        tokens: Tokens of the longest micro-batch.
        peak_memory_bytes: Peak memory so far.
        checkpoint_bytes: Size of a checkpoint with the full optimizer state.
        merged: Whether a layer was merged, which only some methods can.
        seconds: Duration.
    """

    kind: ClassVar[str] = "rehearsed"
    json_keys: ClassVar[Mapping[str, str]] = {"merged": "folded"}
    tokens: int
    peak_memory_bytes: int
    checkpoint_bytes: int
    merged: bool
    seconds: float


@dataclass(frozen=True)
class StepMetrics(Event):
    """One optimizer step.

    Attributes:
        step: From 1.
        total_steps: Steps of the whole run.
        epoch: Epochs done after this step, as a fraction.
        loss: Mean over the step's target tokens, in nats.
        gradient_norm: L2 norm before clipping.
        learning_rate: Learning rate of this step.
        tokens: Tokens of all rows so far; a shared prefix counts for each of its rows.
        tokens_per_second: Throughput of this step.
        peak_memory_bytes: Peak of the GPU, or of the process's resident set without one.
        seconds: Training time so far, over all attempts.
    """

    kind: ClassVar[str] = "step"
    step: int
    total_steps: int
    epoch: float
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    seconds: float


@dataclass(frozen=True)
class ValidationResult(Event):
    """The validation loss after `step` steps, in nats per target token."""

    kind: ClassVar[str] = "validation"
    step: int
    loss: float
    perplexity: float
    rows: int


@dataclass(frozen=True)
class RanksChosen(Event):
    """LoRA rank of each layer after `step` steps, by the layer's name, from a method that allocates ranks (AdaLoRA)."""

    kind: ClassVar[str] = "ranks"
    step: int
    ranks: dict[str, int]


@dataclass(frozen=True)
class SampleGenerated(Event):
    """Generated answer to a validation prompt after `step` steps, and the reference answer."""

    kind: ClassVar[str] = "sample"
    step: int
    prompt: str
    answer: str
    reference: str


@dataclass(frozen=True)
class TrainingWarning(Event):
    """A warning of the training diagnostics.

    Attributes:
        step: Step after which the problem was detected.
        what: The problem, with the numbers that show it.
        hint: What to do.
    """

    kind: ClassVar[str] = "warning"
    step: int
    what: str
    hint: str


@dataclass(frozen=True)
class BestCheckpoint(Event):
    """The result is the weights of an earlier step, which had the lowest validation loss.

    Attributes:
        step: Steps trained.
        best_step: Step of the result.
        loss: Validation loss of the result, in nats.
        stopped_early: Whether training ended before its last step.
    """

    kind: ClassVar[str] = "best"
    step: int
    best_step: int
    loss: float
    stopped_early: bool


@dataclass(frozen=True)
class Progress(Event):
    """Progress of a countable task; `total` is None if unknown."""

    kind: ClassVar[str] = "progress"
    doing: str
    done: int
    total: int | None
    unit: str = "rows"


@dataclass(frozen=True)
class DataRead(Event):
    """All rows are tokenized; `report` is the content of `data_report.json`."""

    kind: ClassVar[str] = "data"
    json_keys: ClassVar[Mapping[str, str]] = {"report": "ledger"}
    report: dict[str, Any]


@dataclass(frozen=True)
class TrainingFinished(Event):
    """The run is complete and its weights are saved in `trained`.

    `ranks` are those of the last `RanksChosen`. `standalone_by` is the command that writes a standalone model, if
    there is one. `best_step` is the step of the saved weights if it is not the last.
    """

    kind: ClassVar[str] = "finished"
    run_directory: str
    trained: str
    standalone_by: str | None
    steps: int
    loss: float
    validation_loss_before: float | None
    validation_loss: float | None
    tokens: int
    seconds: float
    peak_memory_bytes: int
    ranks: dict[str, int] | None = None
    best_step: int | None = None


Recorded = StepMetrics | ValidationResult | RanksChosen | SampleGenerated | TrainingWarning | BestCheckpoint
"""Events that are recorded in `metrics.jsonl`."""

EventHandler = Callable[[Event], None]


def ignore(event: Event) -> None:
    """An event handler that does nothing."""
    del event

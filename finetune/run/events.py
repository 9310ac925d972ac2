"""What a job reports while it works: small records that a terminal, a file or a program can show."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Event:
    """Base of all records; `kind` names the record in JSON."""

    kind: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values, its kind first; a number that is not finite, which JSON lacks, becomes null."""
        values = {name: None if _is_endless(value) else value for name, value in asdict(self).items()}
        return {"event": self.kind, **values}


def _is_endless(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


@dataclass(frozen=True)
class Phase(Event):
    """Something that takes a while has begun."""

    kind: ClassVar[str] = "phase"
    doing: str


@dataclass(frozen=True)
class TrainingStarted(Event):
    """Everything is loaded; the first step comes next.

    Attributes:
        run_directory: Where the run is kept.
        model: The base model's name.
        method: `adapter.method`.
        quantization: `quantization.kind`.
        trainable_parameters: Numbers that train.
        total_parameters: Numbers of the model and adapter, packed ones counted one by one.
        train_rows: Rows to train on.
        validation_rows: Held-out rows.
        target_tokens: Trained tokens of one epoch.
        total_steps: Optimizer steps of the run.
        compute_dtype: Type of the forward pass.
        planned_memory_bytes: The most memory that the run should take, as `ft plan` counts it; None where it did not.
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
    """The state of a checkpoint is back in place; the step after `step` comes next."""

    kind: ClassVar[str] = "resumed"
    checkpoint: str
    step: int
    total_steps: int


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A checkpoint is committed: whatever happens now, the run can go on from here."""

    kind: ClassVar[str] = "saved"
    checkpoint: str
    step: int
    size_bytes: int
    seconds: float


@dataclass(frozen=True)
class DryRunPassed(Event):
    """The whole path was walked once, on the longest rows, and everything put back.

    Attributes:
        tokens: Of the longest micro-batch.
        peak_memory_bytes: Up to then.
        checkpoint_bytes: Of a checkpoint with all of the optimizer's state.
        folded: Whether a layer was merged too, which not all methods do.
        seconds: That it took.
    """

    kind: ClassVar[str] = "rehearsed"
    tokens: int
    peak_memory_bytes: int
    checkpoint_bytes: int
    folded: bool
    seconds: float


@dataclass(frozen=True)
class StepMetrics(Event):
    """One optimizer step.

    Attributes:
        step: From 1.
        total_steps: Steps of the whole run.
        epoch: Passes over the data done after this step.
        loss: Mean over the step's trained tokens, in nats.
        gradient_norm: Before clipping.
        learning_rate: That this step used.
        tokens: Tokens of the rows seen so far; those that rows share count for each.
        tokens_per_second: Of this step.
        peak_memory_bytes: Of the GPU, or of the process where there is none.
        seconds: Since training began.
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
    """The held-out loss after `step` steps, in nats per trained token."""

    kind: ClassVar[str] = "validation"
    step: int
    loss: float
    perplexity: float
    rows: int


@dataclass(frozen=True)
class RanksChosen(Event):
    """How many ranks each layer's update has after `step` steps, by the layer's name, from a method that chooses."""

    kind: ClassVar[str] = "ranks"
    step: int
    ranks: dict[str, int]


@dataclass(frozen=True)
class SampleGenerated(Event):
    """What the model answers to a held-out prompt after `step` steps, and what it should have answered."""

    kind: ClassVar[str] = "sample"
    step: int
    prompt: str
    answer: str
    reference: str


@dataclass(frozen=True)
class TrainingWarning(Event):
    """Something that is worth acting on while the run goes on.

    Attributes:
        step: After which it was seen.
        what: It, with the numbers that show it.
        hint: What to do.
    """

    kind: ClassVar[str] = "warning"
    step: int
    what: str
    hint: str


@dataclass(frozen=True)
class BestCheckpoint(Event):
    """The result is the weights after an earlier step, whose held-out loss was the lowest.

    Attributes:
        step: Steps that were trained.
        best_step: Steps that the result has.
        loss: Its held-out loss.
        stopped_early: Whether training was to go on.
    """

    kind: ClassVar[str] = "best"
    step: int
    best_step: int
    loss: float
    stopped_early: bool


@dataclass(frozen=True)
class Progress(Event):
    """Part of something countable is done; `total` is None where it shows only at the end."""

    kind: ClassVar[str] = "progress"
    doing: str
    done: int
    total: int | None
    unit: str = "rows"


@dataclass(frozen=True)
class DataRead(Event):
    """All rows are tokenized; `ledger` is what `data_report.json` holds."""

    kind: ClassVar[str] = "data"
    ledger: dict[str, Any]


@dataclass(frozen=True)
class TrainingFinished(Event):
    """The run is complete and its weights are saved in `trained`.

    `ranks` as in the last `RanksChosen`; `standalone_by` is the command that writes a model by itself, if one can;
    `best_step` is the step whose weights they are, where these are not the last.
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
"""What `metrics.jsonl` keeps: all that the course of a run is told by."""

EventHandler = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Report to nobody."""
    del event

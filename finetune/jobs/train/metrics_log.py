"""What a run records of its course: each event goes to `metrics.jsonl`, then to whoever follows."""

from __future__ import annotations

from finetune.run.directory import RunDirectory
from finetune.run.events import Event, EventHandler, Recorded, StepMetrics, ValidationResult
from finetune.train.diagnostics import TrainingDiagnostics


class MetricsLogger:
    """A report of the main process that also records, and adds what the events show to be worth acting on.

    Args:
        run: Where to.
        on_event: Told of each.
        diagnostics: Of the run's course so far.
    """

    def __init__(self, run: RunDirectory, on_event: EventHandler, diagnostics: TrainingDiagnostics) -> None:
        self._run, self._on_event, self._diagnostics = run, on_event, diagnostics

    def __call__(self, event: Event) -> None:
        """Record an event and tell it."""
        self._tell(event)
        if isinstance(event, StepMetrics | ValidationResult):
            for warning in self._diagnostics.see(event):
                self._tell(warning)

    def _tell(self, event: Event) -> None:
        assert isinstance(event, Recorded)
        self._run.append_metrics(event)
        self._on_event(event)

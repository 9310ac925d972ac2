"""The metrics log: each recorded event goes to `metrics.jsonl`, then to the event handler."""

from __future__ import annotations

from finetune.run.directory import RunDirectory
from finetune.run.events import Event, EventHandler, Recorded, StepMetrics, ValidationResult
from finetune.train.diagnostics import TrainingDiagnostics


class MetricsLogger:
    """An event handler of the main process that also records, and adds the warnings of the diagnostics.

    Args:
        run: The run directory.
        on_event: Called with each recorded event.
        diagnostics: With the history of the run so far.
    """

    def __init__(self, run: RunDirectory, on_event: EventHandler, diagnostics: TrainingDiagnostics) -> None:
        self._run, self._on_event, self._diagnostics = run, on_event, diagnostics

    def __call__(self, event: Event) -> None:
        """Record an event, and any warning that follows from it."""
        self._log(event)
        if isinstance(event, StepMetrics | ValidationResult):
            for warning in self._diagnostics.see(event):
                self._log(warning)

    def _log(self, event: Event) -> None:
        assert isinstance(event, Recorded)
        self._run.append_metrics(event)
        self._on_event(event)

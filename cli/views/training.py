"""Results of `ft train`, `ft watch` and the smoke test."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune.formatting import count, counted, duration, memory

from ..output import show_json, show_result

if TYPE_CHECKING:
    from finetune.jobs.smoke_test import Smoke
    from finetune.run.events import TrainingFinished
    from finetune.run.index import RunSummary
    from finetune.run.outcome import Outcome


def show_training(finished: TrainingFinished, run: Path, as_json: bool) -> None:
    """Print the results of a training and the usual next commands."""
    if as_json:
        show_json(finished.to_json())
        return
    trained = Path(finished.trained).name
    commands = [f"ft {command} {run}" for command in ("eval", finished.standalone_by) if command]
    lines = [
        *result_lines(finished),
        *rank_lines(finished.ranks, run),
        f"weights: {run / trained}",
        f"report: {run / 'report.html'}",
        f"next: {'   '.join(commands)}",
    ]
    show_result("\n".join(lines))


def show_finished_already(run: Path, length: str, as_json: bool) -> None:
    """Print that a run is finished and how to train it longer; `length` is the key of its length."""
    if as_json:
        show_json({"event": "nothing_left", "run_directory": str(run.absolute())})
        return
    show_result(f"nothing to do: {run} is finished\nto train longer: ft train --resume {run} --set {length}=...")


def show_watched(summary: RunSummary, outcome: Outcome, run: Path, as_json: bool) -> None:
    """Print the final state of a watched run, and how to resume it if it can be resumed."""
    if as_json:
        show_json({"event": "watched", "state": summary.state, "step": summary.step, "exit": outcome})
        return
    why = f": {outcome['message']}" if summary.state not in ("finished", "training") and "message" in outcome else ""
    lines = [f"{state_label(summary.state)} after step {summary.step}{why}"]
    match summary.state:
        case "finished":
            lines.append(f"next: ft eval {run}   ft report {run}")
        case "can go on" | "resumable":
            lines.append(f"resume: ft train --resume {run}")
    show_result("\n".join(lines))


def state_label(state: str) -> str:
    """State of a run for people; JSON keeps the original word."""
    return "resumable" if state == "can go on" else state


def show_smoke_test(passed: Smoke, recipe: Path, as_json: bool) -> None:
    """Print the checks that a smoke test passed."""
    if as_json:
        show_json({"event": "smoke", **passed.to_json()})
        return
    done = [counted(passed.steps, "step")]
    if passed.answered:
        done.append(f"{counted(passed.answered, 'row')} answered")
    if passed.written:
        done.append(f"{passed.written}: logits within {passed.difference:.1e}")
    if passed.adapter:
        done.append("adapter exported")
    show_result(f"{recipe}: smoke test passed ({'; '.join(done)}; {passed.seconds:.0f} s)")


def result_lines(event: TrainingFinished) -> list[str]:
    """Steps, speed, memory and losses of a finished run."""
    lines = [
        f"trained {counted(event.steps, 'step')} in {duration(event.seconds)}, "
        f"{count(event.tokens)} tokens ({event.tokens / event.seconds:.0f} tok/s), "
        f"peak memory {memory(event.peak_memory_bytes)}"
    ]
    if event.validation_loss is not None and event.validation_loss_before is not None:
        lines.append(f"validation loss {event.validation_loss_before:.4f} -> {event.validation_loss:.4f}")
    return lines


def rank_lines(chosen: dict[str, int] | None, run: Path) -> list[str]:
    """Ranks that the method chose for each layer; no table where it would be wider than a terminal."""
    if chosen is None:
        return []
    from finetune.run.lora_ranks import table

    return [f"ranks per layer; their history: {run / 'ranks.svg'}", *(table(chosen) or ())]

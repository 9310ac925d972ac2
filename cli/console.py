"""All that people and programs see: the only module that prints.

Results go to standard output; progress, notes and errors to standard error. With `--json`, standard output
carries one object a line and nothing else.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from finetune.errors import CheckFailedError, FinetuneError, Interrupted, RecipeError, Stopped

from .sanitize import sanitize

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from finetune.jobs.infer.evaluate_results import EvaluationResult, Score
    from finetune.jobs.plan.estimate import Plan
    from finetune.jobs.plan.preview import MicroBatch, Preview
    from finetune.jobs.smoke_test import Smoke
    from finetune.jobs.train.reproduce import Reproduction
    from finetune.recipe.explain import Explanation
    from finetune.recipe.importing.convert import Imported
    from finetune.recipe.methods import Choice
    from finetune.run.comparison import Difference
    from finetune.run.events import Event, EventHandler, TrainingFinished
    from finetune.run.index import Removable, RunSummary
    from finetune.run.sweep_trials import SweepDirectory, Trial

    from .progress import Follower

_json_mode = False


def use_json(asked: bool) -> bool:
    """Set whether errors are told to a program too; the callback of `--json`, so that it holds from the first one."""
    global _json_mode
    _json_mode = asked
    return asked


def show_result(text: str) -> None:
    """Print what the command was asked for."""
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


def show_note(text: str) -> None:
    """Print a remark on standard error."""
    sys.stderr.write(text + "\n")


def show_error(error: FinetuneError) -> None:
    """Print what went wrong, where, and what to do; with `--json` as an event too."""
    is_stop = isinstance(error, Stopped | Interrupted)
    if _json_mode:
        event = "stopped" if is_stop else "error"
        show_result(json.dumps({"event": event, "code": error.exit_code, **_error_fields(error)}))
    title = _styled("stopped", "1;33") if is_stop else _styled("error", "1;31")
    for line in error.lines():
        show_note(_styled(line, "33") if line.startswith("  ->") else f"{title}: {line}")


def exit_immediately() -> NoReturn:
    """End the process here and now, with the cursor that a moving line hides."""
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\033[?25h\n")
    os._exit(Interrupted.exit_code)


def show_watched(summary: RunSummary, outcome: dict[str, Any], run: Path, as_json: bool) -> None:
    """Print what has become of a run that was watched."""
    if as_json:
        show_result(json.dumps({"event": "watched", "state": summary.state, "step": summary.step, "exit": outcome}))
        return
    why = f": {outcome['message']}" if summary.state not in ("finished", "training") and "message" in outcome else ""
    lines = [f"{summary.state} after step {summary.step}{why}"]
    match summary.state:
        case "finished":
            lines.append(f"next: ft eval {run}   ft report {run}")
        case "resumable":
            lines.append(f"resume it: ft train --resume {run}")
    show_result("\n".join(lines))


def show_nothing_left(run: Path, as_json: bool) -> None:
    """Print that a run is finished already."""
    if as_json:
        show_result(json.dumps({"event": "nothing_left", "run_directory": str(run.absolute())}))
        return
    show_result(
        f"nothing left to do: {run} is finished\nto train on: ft train --resume {run} --set training.epochs=..."
    )


def _error_fields(error: FinetuneError) -> dict[str, Any]:
    if isinstance(error, RecipeError):
        return {"what": error.what, "problems": [vars(problem) for problem in error.problems]}
    return {"what": error.what, "where": error.where, "hint": error.hint}


def _short(path: Path) -> Path:
    """A path from where we are, if it is below."""
    here = Path.cwd()
    return path.relative_to(here) if here in path.parents else path


def _styled(text: str, code: str, stream: TextIO | None = None) -> str:
    """ANSI colours for a terminal, plain text elsewhere; by default standard error is looked at."""
    plain = not (stream or sys.stderr).isatty() or "NO_COLOR" in os.environ
    return text if plain else f"\033[{code}m{text}\033[0m"


@contextmanager
def reporting(
    quiet: bool, as_json: bool, log: Path | None = None, speaks: bool = True, brief: bool = False
) -> Iterator[EventHandler]:
    """Follow a job: yields the function that it reports to.

    Args:
        quiet: Show remarks only.
        as_json: Write events to standard output as JSON.
        log: A file that gets every event and remark in words, whatever the terminal shows.
        speaks: Show and log nothing at all if not: another process of the run does.
        brief: Do not show people what a run starts with, for it is that of the run before.
    """
    from finetune.run.events import DataRead, TrainingStarted

    with (
        following(quiet, as_json, speaks) as follower,
        _logging_to(follower, log if speaks else None) as log_event,
    ):

        def report(event: Any) -> None:
            if as_json or not (brief and isinstance(event, DataRead | TrainingStarted)):
                follower.event(event)
            log_event(event)

        yield report


@contextmanager
def following(quiet: bool, as_json: bool, speaks: bool = True) -> Iterator[Follower]:
    """What shows events as `reporting` does: live on a terminal, as lines in a pipe, as JSON to programs."""
    from .progress import JsonLines, Lines, Live, Silent

    follower: Follower
    if not speaks:
        follower = Silent(io.StringIO())
    elif as_json:
        follower = JsonLines(sys.stdout, sys.stderr)
    elif quiet:
        follower = Silent(sys.stderr)
    elif sys.stderr.isatty():
        from rich.console import Console

        follower = Live(Console(stderr=True))
    else:
        follower = Lines(sys.stderr)
    try:
        yield follower
    finally:
        follower.close()


@contextmanager
def _logging_to(follower: Follower, log: Path | None) -> Iterator[EventHandler]:
    """Send the library's log to the follower, and with the events' words to the log file."""
    _quiet_libraries()
    logger = logging.getLogger("finetune")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handlers: list[logging.Handler] = [_NoteHandler(follower)]
    if log is not None:
        handlers.append(_LogFile(log, follower))
    logger.handlers[:] = handlers
    try:
        yield lambda event: _log_event(handlers[1:], event)
    finally:
        for handler in handlers:
            handler.close()
        logger.handlers.clear()
        logger.propagate = True


class _NoteHandler(logging.Handler):
    """Shows what the library logs as remarks, each once."""

    def __init__(self, follower: Follower) -> None:
        super().__init__()
        self.follower = follower
        self.shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "note" if record.levelno < logging.WARNING else "warning"
        text = f"{prefix}: {record.getMessage()}"
        if text not in self.shown:
            self.shown.add(text)
            self.follower.note(text)


class _LogFile(logging.FileHandler):
    """The log on disk. A disk that is full is told once: what was logged waits, and a log is not worth a run."""

    def __init__(self, path: Path, follower: Follower) -> None:
        super().__init__(path, encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.follower = follower
        self.is_full = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Called where a record could not be written."""
        del record
        if not self.is_full:
            self.follower.note(f"warning: {self.baseFilename} cannot be written: {sys.exc_info()[1]}")
        self.is_full = True

    def close(self) -> None:
        """Close the file, be it with what there is room for."""
        with suppress(OSError):
            super().close()


def _log_event(handlers: list[logging.Handler], event: Event) -> None:
    from . import wording

    text = wording.line(event)
    for handler in handlers if text else ():
        handler.emit(logging.LogRecord("finetune", logging.INFO, "", 0, text, None, None))


def _quiet_libraries() -> None:
    """Keep other libraries' progress bars and remarks off the terminal: what matters of them, we say ourselves."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("bitsandbytes", "accelerate", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def show_training(finished: TrainingFinished, run: Path, as_json: bool) -> None:
    """Print what a training came to, and the commands that usually come next."""
    from . import wording

    if as_json:
        show_result(json.dumps(finished.to_json()))
        return
    trained = Path(finished.trained).name
    commands = [f"ft {command} {run}" for command in ("eval", finished.standalone_by) if command]
    lines = [
        *wording.outcome(finished),
        *wording.ranks(finished.ranks, run),
        f"weights: {run / trained}",
        f"report: {run / 'report.html'}",
        f"next: {'   '.join(commands)}",
    ]
    show_result("\n".join(lines))


def show_smoke(passed: Smoke, recipe: Path, as_json: bool) -> None:
    """Print what went well, or as the last JSON event."""
    if as_json:
        show_result(json.dumps({"event": "smoke", **passed.to_json()}))
        return
    done = [f"{passed.steps} steps"]
    if passed.answered:
        done.append(f"{passed.answered} rows answered")
    if passed.written:
        done.append(f"{passed.written}: logits within {passed.difference:.1e}")
    if passed.adapter:
        done.append("adapter exported")
    show_result(f"{recipe}: the path works ({'; '.join(done)}; {passed.seconds:.0f} s)")


def show_evaluation(evaluated: EvaluationResult, as_json: bool) -> None:
    """Print what a model reached, beside another where there is one, and what became of the gates."""
    if as_json:
        show_result(json.dumps({"event": "evaluated", "folder": _text(evaluated.folder), **evaluated.to_json()}))
        return
    from rich.console import Console

    from finetune.report.run_page import answered_by

    from . import wording

    for task, scores in evaluated.scores.items():
        Console().print(_scores_table(wording.task_title(task, scores), evaluated, scores))
    if note := answered_by(evaluated.to_json()):
        show_result(note)
    for gate in evaluated.gates:
        sign = "met" if gate.is_met else "NOT met"
        show_result(f"gate {gate.gate}: {sign}, {gate.measured} is {gate.value:.4g}")
    if evaluated.folder:
        show_result(f"results and answers: {evaluated.folder}")


def _scores_table(title: str, evaluated: EvaluationResult, scores: dict[str, Score]) -> Table:
    from rich.table import Table

    from . import wording

    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    has_flips = any(score.difference and wording.flips(score.difference) for score in scores.values())
    compared = ["difference"] if evaluated.against else []
    models = [evaluated.against, evaluated.label] if evaluated.against else [evaluated.label]
    table.add_column("")
    for column in (*models, *compared, "95 % interval", *(["better/worse"] if has_flips else [])):
        table.add_column(column, justify="right", overflow="fold")
    for name, score in scores.items():
        values = [wording.score(score.unit, each.value) for each in (score.theirs, score.ours) if each]
        change = [wording.difference(score)] if evaluated.against else []
        spread = score.difference.change if score.difference else None if evaluated.against else score.ours
        flipped = [wording.flips(score.difference) if score.difference else ""] if has_flips else []
        table.add_row(
            name.replace("_", " "), *values, *change, wording.interval(score.unit, spread, bool(change)), *flipped
        )
    return table


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def show_merge(verification: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Print where the merged model is and how it compares with the trained one."""
    if as_json:
        show_result(json.dumps({"event": "merged", "folder": str(folder), **verification}))
        return
    show_result(f"merged model: {folder} ({verification['dtype']})\n{_agreement(verification)}")


def show_export(
    format: str,
    verification: dict[str, Any] | None,
    folder: Path,
    repository: str | None,
    address: str | None,
    as_json: bool,
) -> None:
    """Print where what was exported is, how it compares with the trained model, and how to use it."""
    if as_json:
        pushed = {} if repository is None else {"repository": repository, "address": address}
        show_result(json.dumps({"event": "exported", "folder": str(folder), **(verification or {}), **pushed}))
        return
    lines = [f"exported {format}: {folder}" + (f" ({_type_of(verification)})" if verification else "")]
    if verification:
        lines.append(_agreement(verification))
    if format == "prompt" and verification:
        begins = (
            "the folder's chat template begins with them"
            if verification["uses_chat_template"]
            else "begin every text with `prompt` of export.json, and add no special tokens to it"
        )
        lines.append(f"the trained prompt is new tokens of the vocabulary: {begins}")
    else:
        lines.append(f"how to use it: {folder / 'README.md'}")
    if address:
        lines.append(f"on the hub: {address}")
    show_result("\n".join(lines))


def _type_of(verification: dict[str, Any]) -> str:
    found: str = verification.get("dtype") or verification["type"]
    return found


def _agreement(verification: dict[str, Any]) -> str:
    """What a certificate says of written and trained logits."""
    return (
        f"checked on {verification['positions']} tokens of {verification['rows']} real rows: largest logit difference "
        f"{verification['relative_difference']:.1e} of the largest logit (bound {verification['bound']:.0e}),\n"
        f"KL divergence {verification['kl_divergence']:.1e}, same likeliest token at "
        f"{100 * verification['top1_agreement']:.1f} % of the positions"
    )


def show_quantized(record: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Print where the quantized model is, its size and its errors."""
    if as_json:
        show_result(json.dumps({"event": "quantized", "folder": str(folder), **record}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{record['layer_count']} layers in {record['kind']}", title_justify="left")
    table.add_column("")
    for column in ("before", "after"):
        table.add_column(column, justify="right")
    bits = [f"{record[name]:.3f}" for name in ("bits_per_weight_before", "bits_per_weight")]
    table.add_row("bits per weight of these layers", *bits)
    table.add_row("all weights, on disk", *(f"{record[name] / 1e6:.1f} MB" for name in ("bytes_before", "bytes_after")))
    rows = {
        "mean error of the weights": "weight_error",
        "mean error of the layers' outputs": "output_error",
        "the same, rounded to nearest": "nearest_output_error",
    }
    for title, name in rows.items():
        if record[name] is not None:
            table.add_row(title, "", f"{100 * record[name]:.2f} %")
    Console().print(table)
    show_result(f"quantized model: {folder}")


def show_combination(verification: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Print where the combined model is and how far each run is in it."""
    if as_json:
        show_result(json.dumps({"event": "combined", "folder": str(folder), **verification}))
        return
    lines = [f"combined model: {folder} ({verification['dtype']})"]
    for name, found in verification["runs"].items():
        lines.append(
            f"{name}: same likeliest token as the run alone at {100 * found['top1_agreement']:.1f} % of "
            f"{found['positions']} positions of its rows, KL divergence {found['kl_divergence']:.1e}"
        )
    show_result("\n".join(lines))


def is_watched() -> bool:
    """Whether a person reads the results."""
    return sys.stdout.isatty()


def is_asked() -> bool:
    """Whether a person writes what is read."""
    return sys.stdin.isatty()


@contextmanager
def words() -> Iterator[Callable[[str], None]]:
    """Print an answer while it is written: yields the function that takes its pieces, and ends the line."""

    def write(piece: str) -> None:
        sys.stdout.write(_sanitize(piece))
        sys.stdout.flush()

    try:
        yield write
    finally:
        write("\n")


def read_line(prompt: str) -> str | None:
    """A line that a person or a program writes, None where there are no more; Ctrl-C empties it."""
    try:
        if is_asked() and is_watched():
            import readline  # noqa: F401, from here on `input` knows the arrow keys

            return input(prompt)
        if is_asked():
            sys.stderr.write(prompt)
            sys.stderr.flush()
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None
    except EOFError:
        show_note("")
        return None
    except KeyboardInterrupt:
        show_note("")
        return ""


def show_answers(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print answers: one as it is; of several, each below the prompt and the name of who gave it."""
    if as_json:
        for row in rows:
            show_result(json.dumps(row, ensure_ascii=False))
        return
    if len(rows) == 1:
        show_result(_sanitize(rows[0]["generated"]))
        return
    has_prompts, has_names = (len({row[key] for row in rows}) > 1 for key in ("prompt", "adapter"))
    blocks = []
    for index, row in enumerate(rows):
        lines = []
        if has_prompts and (index == 0 or rows[index - 1]["prompt"] != row["prompt"]):
            lines.append(_titled(f"> {row['prompt']}"))
        if has_names:
            lines.append(_titled(f"{row['adapter']}:"))
        blocks.append("\n".join([*lines, _sanitize(row["generated"])]))
    show_result("\n\n".join(blocks))


def _titled(text: str) -> str:
    return _styled(_sanitize(text), "1", sys.stdout)


def _sanitize(text: str) -> str:
    """What a model writes: to a pipe as it is."""
    return sanitize(text) if is_watched() else text


def show_written(file: Path, answers: int, as_json: bool) -> None:
    """Print where answers are."""
    if as_json:
        show_result(json.dumps({"event": "generated", "file": str(file), "answers": answers}))
        return
    show_result(f"{answers} answer{'s' if answers != 1 else ''}: {file}")


def answer(question: str, default: str | None = None) -> str | None:
    """Ask a person, who may take the default by an empty line; where there is none, the default."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return default
    sys.stderr.write(f"{question}{f' [{default}]' if default else ''}: ")
    sys.stderr.flush()
    return sys.stdin.readline().strip() or default


def is_confirmed(question: str) -> bool:
    """Ask a person; where there is none, the answer is no."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def show_runs(summaries: list[RunSummary], folder: Path, as_json: bool) -> None:
    """Print a line for each run."""
    if as_json:
        for summary in summaries:
            show_result(json.dumps({**asdict(summary), "path": str(summary.path)}))
        return
    if not summaries:
        show_result(f"no runs in {folder}")
        return
    from rich.console import Console
    from rich.table import Table

    from finetune.formatting import size

    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("run", "state", "step", "loss", "held out", "size"):
        table.add_column(title, justify="left" if title in ("run", "state") else "right", overflow="fold")
    for summary in summaries:
        losses = ["" if loss is None else f"{loss:.4f}" for loss in (summary.loss, summary.validation_loss)]
        row = (summary.path.name, summary.state, str(summary.step), *losses, size(summary.size_bytes))
        table.add_row(*row)
    Console().print(table)


def show_removable(found: list[Removable], folder: Path) -> None:
    """Print what would be removed, and what that wins."""
    from finetune.formatting import size

    if not found:
        show_result(f"nothing to remove in {folder}")
        return
    for each in found:
        show_result(f"{each.path}  {size(each.size_bytes)}: {each.why}")
    show_result(f"together {size(sum(each.size_bytes for each in found))}")


def show_differences(found: list[Difference], as_json: bool) -> None:
    """Print what differs between two runs, part by part."""
    if as_json:
        for each in found:
            show_result(json.dumps(asdict(each)))
        return
    if not found:
        show_result("no difference")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("part", "key", "first", "second"):
        table.add_column(title, overflow="fold")
    for each in found:
        table.add_row(each.part, each.key, each.first, each.second)
    Console().print(table)


def show_reproduction(result: Reproduction, as_json: bool) -> None:
    """Print whether two runs have the same weights, and what else differs."""
    if as_json:
        show_result(json.dumps({"event": "reproduced", **asdict(result), "run_directory": str(result.run_directory)}))
        return
    verdict = "the same bit for bit" if result.is_identical else "not the same"
    show_result(f"{', '.join(result.files)}: {verdict} ({result.run_directory})")
    if result.differences:
        show_differences(result.differences, as_json=False)


def show_catalogue(choices: list[Choice], as_json: bool) -> None:
    """Print what a recipe can choose, a few lines each."""
    if as_json:
        for choice in choices:
            show_result(json.dumps(asdict(choice)))
        return
    from . import wording

    width = shutil.get_terminal_size().columns
    show_result("\n".join(line for choice in choices for line in wording.choice(choice, width)))


def show_trial(trial: Trial, total: int, as_json: bool) -> None:
    """Print which trial comes next, and what it tries."""
    if as_json:
        show_result(
            json.dumps({"event": "trial", "trial": trial.number, "values": trial.values, "run": str(trial.path)})
        )
        return
    from finetune.formatting import value as in_words
    from finetune.run.sweep_trials import short_names

    names = short_names(list(trial.values))
    values = "  ".join(f"{names[key]} {in_words(value)}" for key, value in trial.values.items())
    show_note(_styled(f"trial {trial.number} of {total}: {values}", "1"))


def show_sweep(directory: SweepDirectory, recipe: Path, as_json: bool) -> None:
    """Print all trials, the best first, and how to train with its values.

    Raises:
        CheckFailedError: None has a result.
    """
    from finetune.run.sweep_trials import arguments_of, best_of, trial_table

    trials = directory.trials()
    best = best_of(trials)
    if as_json:
        for trial in trials:
            show_result(json.dumps({"event": "trial_done", **asdict(trial), "path": str(trial.path)}))
    else:
        from rich.console import Console
        from rich.table import Table

        head, rows = trial_table(trials)
        table = Table(box=None, padding=(0, 2, 0, 0))
        for title in head:
            table.add_column(title, overflow="fold", justify="left" if title == "trial" else "right")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    if best is None:
        raise CheckFailedError(
            "no trial has a result", where=str(_short(directory.path)), hint="see the causes in the table above"
        )
    if not as_json:
        show_result(f"page: {_short(directory.page)}\nbest: ft train {recipe} {arguments_of(best)}")


def show_page(file: Path, as_json: bool) -> None:
    """Print where a page is."""
    show_result(json.dumps({"event": "page", "file": str(file)}) if as_json else f"page: {_short(file)}")


def show_sections(sections: dict[str, str], as_json: bool) -> None:
    """Print the sections of a recipe and what each is for."""
    if as_json:
        show_result(json.dumps(sections, ensure_ascii=False))
        return
    from . import wording

    width = shutil.get_terminal_size().columns
    show_result(
        "\n".join(["sections of a recipe; `ft explain SECTION` tells more", *wording.described(sections, width)])
    )


def show_explanation(explanation: Explanation, values: dict[str, list[str]], as_json: bool) -> None:
    """Print what there is to know of a key, and the values that recipes give to it."""
    if as_json:
        show_result(json.dumps({**asdict(explanation), "recipes": values}, ensure_ascii=False))
        return
    from . import wording

    show_result("\n".join(wording.explanation(explanation, values, shutil.get_terminal_size().columns)))


def show_import(made: Imported, file: Path, as_json: bool) -> None:
    """Print where a translated recipe is, and what it does not have."""
    if as_json:
        show_result(json.dumps({"event": "imported", "file": str(file), "carried": made.carried}))
        for each in made.left:
            show_result(json.dumps({"event": "not_carried", **asdict(each)}, ensure_ascii=False))
        return
    from . import wording

    show_result("\n".join(wording.imported(made, file, shutil.get_terminal_size().columns)))


def show_plan(plan: Plan) -> None:
    """Print what a run will take, by part."""
    from . import wording

    for line in wording.plan(plan):
        show_result(line)


def show_changes(changes: dict[str, str], recipe: Path, output: Path | None) -> None:
    """Print what makes a run fit, and how to have it."""
    if not changes:
        show_result("it fits as it is")
        return
    show_result("\nit fits with")
    for key, new in changes.items():
        show_result(f"  {key}: {new}")
    settings = " ".join(f"--set {key}={new}" for key, new in changes.items())
    show_result(f"written to {output}" if output else f"next: ft train {recipe} {settings}")


def show_preview(preview: Preview) -> None:
    """Print rows token by token: trained ones green, special ones in angle quotes, line ends visible."""
    from rich.console import Console
    from rich.text import Text

    from . import wording

    console = Console(highlight=False)
    for row in preview.rows:
        trained = sum(stretch.tokens for stretch in row.stretches if stretch.trained)
        console.print(Text(f"{row.where}  {row.tokens} tokens, {trained} trained", style="bold"))
        text = Text()
        for stretch in row.stretches:
            colour = "green" if stretch.trained else "default"
            style = f"reverse {colour}" if stretch.special else colour
            text.append(stretch.text.replace("\n", "↵\n") if not stretch.special else stretch.text, style=style)
        console.print(text, "", sep="\n")
    console.print(Text("green: trained; reversed: special tokens; ↵: end of line", style="dim"))
    longest = max(batch.computed + batch.shared for batch in preview.first_step)
    console.print(Text(wording.first_step(preview), style="bold"))
    for batch in preview.first_step:
        console.print(_drawn_to_scale(batch, longest))
    for line in wording.ledger(preview.ledger):
        console.print(Text(line), soft_wrap=True)


def _drawn_to_scale(batch: MicroBatch, longest: int, width: int = 56) -> Text:
    """A bar a micro-batch: its rows in turns of two shades, and padding as dots."""
    from rich.text import Text

    bar = Text()
    # Rounded in sum, or short rows would add up.
    ends = [round(width * end / longest) for end in accumulate(batch.lengths)]
    for index, end in enumerate(ends):
        bar.append("█" * (end - len(bar)), style="cyan" if index % 2 else "blue")
    bar.append("·" * (round(width * (batch.computed + batch.shared) / longest) - len(bar)), style="dim")
    bar.append(f"  {sum(batch.lengths)}/{batch.computed}", style="dim")
    return bar

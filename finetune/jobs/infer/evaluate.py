"""`ft eval`: what a model reaches in tasks, alone or beside another one on the same rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from torch import nn

import finetune.adapters
import finetune.evaluation
import finetune.models
import finetune.quantizers
import finetune.train
from finetune.errors import CheckFailedError, DataError, RefusedError, UsageError
from finetune.evaluation.engine import Engine, Generator, ModelGenerator
from finetune.evaluation.gates import Gate
from finetune.evaluation.measurement import CONFIDENCE, Interval, Measurement, PairedDifference, difference, interval
from finetune.evaluation.metrics import LOSS, PERPLEXITY, MetricUnit
from finetune.evaluation.prediction_cache import PredictionCache
from finetune.evaluation.tasks import HeldOut, Task
from finetune.jobs.load.context import TrainingContext
from finetune.jobs.load.finetuned_model import FineTunedModel, LoadedAdapter, SharedBase
from finetune.jobs.load.model_ref import Kind, ModelRef
from finetune.jobs.load.vllm import vllm_generator
from finetune.models.fingerprint import fingerprint
from finetune.recipe.load import load_tasks
from finetune.recipe.sections.evaluation import HELD_OUT, Evaluation, HarnessTask, TaskSection
from finetune.report.run_page import recording_errors
from finetune.resolve import build
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler, ignore
from finetune.run.provenance import file_digest
from finetune.storage.cache import sources_digest
from finetune.storage.files import write_json, written_aside

COMPUTING = (finetune.adapters, finetune.evaluation, finetune.models, finetune.quantizers, finetune.train)
"""Packages of ours whose code decides what a model says."""

_LOSSES = (LOSS.name, PERPLEXITY.name)

SETTINGS = ("config.json", "generation_config.json", "tokenizer.json")
"""Files of a model beside its weights that decide it too."""


@dataclass(frozen=True)
class Asked:
    """What is to be measured.

    Attributes:
        tasks: Names of tasks of the recipe or of lm-evaluation-harness, and files of tasks; empty for all of the
            recipe's.
        limit: Take the first so many rows of each task; None for all.
        gates: What the results must meet.
        engine: What writes answers; losses and choices are always ft's.
        batch_size: Most rows of one forward pass of ft; None for the recipe's.
        output: The folder for results; None for a run's own, and for none where it is no run.
    """

    tasks: tuple[str, ...] = ()
    limit: int | None = None
    gates: tuple[Gate, ...] = ()
    engine: Literal["ft", "vllm"] = "ft"
    batch_size: int | None = None
    output: Path | None = None


@dataclass(frozen=True)
class Score:
    """A metric of a task.

    Attributes:
        form: The metric's unit.
        rows: Rows that it was measured on; None where only the harness knows.
        ours: The score; where nothing is known row by row, an interval without width.
        theirs: That of the other model.
        difference: Row by row, where both were measured so.
    """

    form: MetricUnit
    rows: int | None
    ours: Interval
    theirs: Interval | None
    difference: PairedDifference | None

    def to_json(self) -> dict[str, Any]:
        """The score, and beside another model the difference."""
        facts: dict[str, Any] = {"rows": self.rows, "unit": self.form, **_numbers(self.ours)}
        if self.theirs:
            facts["against"] = _numbers(self.theirs)
        if self.difference:
            flipped = {"better": self.difference.better, "worse": self.difference.worse}
            facts["difference"] = {**_numbers(self.difference.change), **flipped}
        return facts


def _numbers(spread: Interval) -> dict[str, float | None]:
    """As JSON values; a number that is not finite, which JSON lacks, becomes null."""
    return {name: value if math.isfinite(value) else None for name, value in asdict(spread).items()}


@dataclass(frozen=True)
class GateResult:
    """Whether a result met a condition.

    Attributes:
        gate: The condition.
        measured: task/metric.
        value: The result.
        is_met: Whether it is met.
    """

    gate: str
    measured: str
    value: float
    is_met: bool


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found.

    Attributes:
        label: What was measured.
        against: What it was compared with.
        generation_backend: What wrote the answers: ft, or another engine with its version; all else is ft's.
        scores: By task and metric.
        gates: What became of the conditions.
        folder: Where results and answers are; None where they were not written.
    """

    label: str
    against: str | None
    generation_backend: str
    scores: dict[str, dict[str, Score]]
    gates: list[GateResult] = field(default_factory=list)
    folder: Path | None = None

    @property
    def answered(self) -> int:
        """Held-out rows that were answered."""
        scores = self.scores.get(HELD_OUT, {})
        return max((score.rows or 0 for name, score in scores.items() if name not in _LOSSES), default=0)

    def to_json(self) -> dict[str, Any]:
        """What stands in `results.json`."""
        tasks = {
            task: {metric: score.to_json() for metric, score in scores.items()} for task, scores in self.scores.items()
        }
        return {
            "model": self.label,
            "against": self.against,
            "generation_backend": self.generation_backend,
            "confidence": CONFIDENCE,
            "tasks": tasks,
            "gates": [
                {**asdict(gate), "value": gate.value if math.isfinite(gate.value) else None} for gate in self.gates
            ],
        }

    def refuse_failed_gates(self) -> None:
        """All conditions must be met.

        Raises:
            CheckFailedError: One is not.
        """
        failed = [f"{gate.measured} is {gate.value:.4g}, not {gate.gate}" for gate in self.gates if not gate.is_met]
        if failed:
            raise CheckFailedError("; ".join(failed), where=self.label, hint="train on, or lower the gate")


def evaluate(
    named: ModelRef,
    asked: Asked = Asked(),
    against: ModelRef | Literal["base"] | None = None,
    on_event: EventHandler = ignore,
) -> Evaluated:
    """Measure what a name means; results go to `eval/` of a run, or to the folder that is asked for.

    Args:
        named: What is measured.
        asked: In what.
        against: What it is compared with; "base" is what it was trained on.
        on_event: Told of every phase.

    Raises:
        DataError: There are no rows, or one cannot be used.
        UsageError: A task or a metric of a gate is not there, or there is no base.
        UnsupportedError: Losses of models with different tokens were to be compared.
        FinetuneError: A model cannot be opened.
    """
    finetuned = FineTunedModel.find(named, on_event)
    other = _other(finetuned, against, on_event)
    tasks = _tasks(named, finetuned, asked.tasks, on_event)
    _refuse_idle_gates(asked.gates, tasks)
    if other:
        _refuse_other_tokens(finetuned, other, tasks)
    by_vllm = asked.engine == "vllm"
    compared = [(each, vllm_generator(each, on_event) if by_vllm else None) for each in (other, finetuned) if each]
    measured = _measured(compared, tasks, asked, on_event)
    ours, theirs = measured[-1], measured[0] if other else None
    generation_backend = (compared[-1][1] or ModelGenerator).name
    evaluated = Evaluated(named.label, other.label if other else None, generation_backend, _scores(tasks, ours, theirs))
    evaluated.gates.extend(_results_of(asked.gates, evaluated))
    run = RunDirectory(named.path) if named.kind is Kind.RUN else None
    folder = asked.output or (run.evaluation if run else None)
    if folder is not None:
        with recording_errors(run) if run else nullcontext():
            _write(folder, evaluated, tasks, ours, theirs)
    return replace(evaluated, folder=folder)


def _other(
    finetuned: FineTunedModel, against: ModelRef | Literal["base"] | None, on_event: EventHandler
) -> FineTunedModel | None:
    if isinstance(against, ModelRef):
        return FineTunedModel.find(against, on_event)
    if against == "base" and finetuned.trained is None:
        raise UsageError(
            "this is a model as it is, which has no base",
            where=finetuned.label,
            hint="name what it is to be compared with: --against MODEL",
        )
    return finetuned.untuned if against else None


def _tasks(named: ModelRef, finetuned: FineTunedModel, names: Sequence[str], on_event: EventHandler) -> list[Task]:
    """The tasks of these names; without any, all of the recipe."""
    context = finetuned.setup if isinstance(finetuned.setup, TrainingContext) else None
    own = {section.name: section for section in context.recipe.evaluation.tasks} if context else {}
    if not names:
        held_out = [task for task in [_validation(context, on_event)] if task]
        if not held_out and not own:
            raise _nothing_to_measure(named, context)
        return [*held_out, *map(build, own.values())]
    tasks: list[Task] = []
    for name in names:
        if name == HELD_OUT:
            held = _validation(context, on_event)
            if held is None:
                raise _nothing_to_measure(named, context)
            tasks.append(held)
        elif name in own:
            tasks.append(build(own[name]))
        else:
            tasks += map(build, _named_elsewhere(name))
    if twice := next((task.name for task in tasks if [each.name for each in tasks].count(task.name) > 1), None):
        raise UsageError("two tasks have this name", where=f"--tasks {twice}", hint="name one of them otherwise")
    return tasks


def _named_elsewhere(name: str) -> list[TaskSection]:
    """The tasks of a file, or a task of the harness."""
    if name.endswith((".yaml", ".yml")) or Path(name).is_file():
        return load_tasks(Path(name))
    return [HarnessTask(name=name, kind="lm_eval")]


def _validation(context: TrainingContext | None, on_event: EventHandler) -> HeldOut | None:
    if context is None or not (context.recipe.data.validation or context.recipe.data.validation_fraction):
        return None
    rows = context.read_data(on_event).validation
    return HeldOut(rows, context.recipe.evaluation, context.recipe.data.train_on) if len(rows) else None


def _nothing_to_measure(named: ModelRef, context: TrainingContext | None) -> DataError | UsageError:
    if context is None:
        return UsageError(
            "a recipe's held-out rows are known of its runs and their checkpoints only",
            where=named.given,
            hint="name what to measure: --tasks tasks.yaml, or a task of lm-evaluation-harness",
        )
    return DataError(
        "the recipe holds no rows out",
        where=str(named.path),
        hint="train with data.validation or data.validation_fraction, or name a task: --tasks tasks.yaml",
    )


def _refuse_idle_gates(gates: Sequence[Gate], tasks: Sequence[Task]) -> None:
    """A slip in a gate is told before anything is measured, where the tasks tell what they will measure."""
    if all(task.metrics is not None for task in tasks):
        names = [f"{task.name}/{metric}" for task in tasks for metric in task.metrics or ()]
        for gate in gates:
            gate.concerned(names)


def _refuse_other_tokens(finetuned: FineTunedModel, other: FineTunedModel, tasks: Sequence[Task]) -> None:
    ours, theirs = (each.setup.tokenizer.backend_tokenizer.to_str() for each in (finetuned, other))
    losses = [task.name for task in tasks if task.has_loss]
    if losses and ours != theirs:
        raise UsageError(
            f"a loss per token says nothing between models with different tokens, and {losses[0]} measures one",
            where=other.label,
            hint="name tasks of kind generate or choose: --tasks",
        )


def _measured(
    compared: Sequence[tuple[FineTunedModel, Generator | None]],
    tasks: Sequence[Task],
    asked: Asked,
    on_event: EventHandler,
) -> list[list[Measurement]]:
    """What each model reached, one after the other; what stands on the same base is put on it in turn."""
    shares = len({id(finetuned.setup) for finetuned, _ in compared}) == 1
    found = []
    for group in [compared] if shares else [[each] for each in compared]:
        base = _LazyBase([finetuned for finetuned, _ in group], on_event)
        for number, (finetuned, generator) in enumerate(group):
            engine = _engine(finetuned, base, number, generator, asked, on_event)
            with closing(engine.generator):
                found.append([task.measure(engine, asked.limit, on_event) for task in tasks])
    return found


class _LazyBase:
    """A base with what goes on it, loaded once something is asked that is not kept."""

    def __init__(self, finetuned: Sequence[FineTunedModel], on_event: EventHandler) -> None:
        self._tuned, self._on_event = finetuned, on_event

    @cached_property
    def _loaded(self) -> SharedBase:
        return SharedBase(self._tuned, self._on_event)

    def model(self, number: int) -> nn.Module:
        """See `SharedBase.model`."""
        return self._loaded.model(number)

    def supports_prefix_sharing(self, number: int) -> bool:
        """See `SharedBase.supports_prefix_sharing`."""
        return self._loaded.supports_prefix_sharing(number)


def _engine(
    finetuned: FineTunedModel,
    base: _LazyBase,
    number: int,
    generator: Generator | None,
    asked: Asked,
    on_event: EventHandler,
) -> Engine:
    """What is asked; without a writer of its own answers are ours."""
    setup, load = finetuned.setup, partial(base.model, number)
    section = setup.recipe.evaluation if isinstance(setup, TrainingContext) else Evaluation()
    batch_size = asked.batch_size or section.batch_size
    return Engine(
        label=finetuned.label,
        tokenizer=setup.tokenizer,
        uses_chat_template=finetuned.uses_chat_template,
        load=load,
        generator=generator or ModelGenerator(load, setup.tokenizer, batch_size, setup.padding),
        kept=PredictionCache(_identity(finetuned, on_event)),
        compute_dtype=setup.compute_dtype,
        batch_size=batch_size,
        padding=setup.padding,
        may_share=partial(base.supports_prefix_sharing, number),
        positions=setup.positions and setup.positions - finetuned.prompt_tokens,
    )


def _identity(finetuned: FineTunedModel, on_event: EventHandler) -> dict[str, Any]:
    """All that decides what a model says."""
    setup = finetuned.setup
    folder = setup.base_folder(on_event).path
    quantizers = setup.quantizers
    return {
        "base": fingerprint(folder),
        "settings": {name: file_digest(folder / name) for name in SETTINGS if (folder / name).is_file()},
        "quantization": [section.model_dump(mode="json") for section in (quantizers.section, *quantizers.modules)],
        "trained": _identity_of_trained(finetuned.trained) if finetuned.trained else None,
        "types": [str(setup.weight_dtype), str(setup.compute_dtype)],
        "attention": setup.section.attention,
        "device": setup.accelerator.device.type,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "code": sources_digest(*COMPUTING),
    }


def _identity_of_trained(trained: LoadedAdapter) -> list[Any]:
    try:
        return [fingerprint(trained.weights), trained.method.section.model_dump(mode="json")]
    except ValueError as error:
        raise RefusedError(
            f"a file of the trained weights is damaged: {error}",
            where=str(trained.weights),
            hint="train the run again, or bring back a good copy",
        ) from error


def _scores(
    tasks: Sequence[Task], ours: Sequence[Measurement], theirs: Sequence[Measurement] | None
) -> dict[str, dict[str, Score]]:
    return {task.name: _scores_of(mine, other) for task, mine, other in zip_longest(tasks, ours, theirs or ())}


def _scores_of(ours: Measurement, theirs: Measurement | None) -> dict[str, Score]:
    others = {column.metric.name: column for column in theirs.columns} if theirs else {}
    scores = {}
    for column in ours.columns:
        other = others.get(column.metric.name)
        scores[column.metric.name] = Score(
            form=column.metric.form,
            rows=len(column.rows),
            ours=interval(column),
            theirs=interval(other) if other else None,
            difference=difference(column, other) if other else None,
        )
    for name, value in ours.further.items():
        other_value = theirs.further.get(name) if theirs else None
        point = None if other_value is None else Interval(other_value, other_value, other_value)
        scores[name] = Score("nats", None, Interval(value, value, value), point, None)
    return scores


def _results_of(gates: Sequence[Gate], evaluated: Evaluated) -> Iterator[GateResult]:
    values = {
        f"{task}/{metric}": score.ours.value
        for task, scores in evaluated.scores.items()
        for metric, score in scores.items()
    }
    for gate in gates:
        for name in gate.concerned(list(values)):
            yield GateResult(gate.text, name, values[name], gate.holds(values[name]))


def _write(
    folder: Path,
    evaluated: Evaluated,
    tasks: Sequence[Task],
    ours: Sequence[Measurement],
    theirs: Sequence[Measurement] | None,
) -> None:
    """Write `results.json`, and what was said to each row."""
    with written_aside(folder) as aside:
        write_json(aside / "results.json", evaluated.to_json())
        with (aside / "generations.jsonl").open("w", encoding="utf-8") as file:
            for task, mine, other in zip_longest(tasks, ours, theirs or ()):
                for record, beside in zip_longest(mine.records, other.records if other else ()):
                    against = {"against": {key: beside[key] for key in ("answer", "scores")}} if beside else {}
                    file.write(json.dumps({"task": task.name, **record, **against}, ensure_ascii=False) + "\n")

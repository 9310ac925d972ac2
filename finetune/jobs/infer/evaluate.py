"""`ft eval`: scores of a model in tasks, alone or compared with another model on the same rows."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import cache
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
from finetune.errors import DataError, RefusedError, UsageError
from finetune.evaluation.engine import Engine, Generator, ModelGenerator
from finetune.evaluation.gates import Gate
from finetune.evaluation.generation import AnswerDecoder, end_tokens
from finetune.evaluation.measurement import Interval, Measurement, difference, interval
from finetune.evaluation.prediction_cache import PredictionCache
from finetune.evaluation.tasks import Task, ValidationTask
from finetune.jobs.infer.evaluate_results import ComparedClasses, EvaluationResult, GateResult, Score
from finetune.jobs.load.context import TrainingContext
from finetune.jobs.load.finetuned_model import FineTunedModel, LoadedAdapter, SharedBase
from finetune.jobs.load.model_ref import Kind, ModelRef
from finetune.jobs.load.training_record import trained_files
from finetune.jobs.load.vllm import vllm_generator
from finetune.models.fingerprint import fingerprint, fingerprint_files
from finetune.models.loading.dtype import dtype_name
from finetune.models.loading.load import generation_settings
from finetune.recipe.load import load_tasks
from finetune.recipe.sections.evaluation import (
    VALIDATION,
    Evaluation,
    HarnessTask,
    RowsTask,
    TaskSection,
    current_task_name,
)
from finetune.recipe.sections.model import Dtype
from finetune.report.run_page import recording_errors
from finetune.resolve import build
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler, ignore
from finetune.run.provenance import file_digest
from finetune.storage.cache import sources_digest
from finetune.storage.files import check_output, write_json, written_aside
from finetune.storage.opening import open_to_write

logger = logging.getLogger(__name__)

COMPUTING = (finetune.adapters, finetune.evaluation, finetune.models, finetune.quantizers, finetune.train)
"""Packages of ours whose code changes predictions: part of the key of the prediction cache."""

SETTINGS = ("config.json", "generation_config.json")
"""Files of a model beside its weights that change predictions."""


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of `ft eval`.

    Attributes:
        tasks: Names of tasks of the recipe or of lm-evaluation-harness, and files of tasks; empty for all of the
            recipe's.
        limit: Take the first so many rows of each task; None for all.
        gates: Conditions on the results.
        engine: Generates the answers; losses and choices are always ft's.
        batch_size: Most rows of one forward pass of ft; None for the recipe's.
        output: The folder for results; None for a run's own, and for none where it is no run.
        dtype: To compute in; None for the type of the training, or of the one that suits the device.
    """

    tasks: tuple[str, ...] = ()
    limit: int | None = None
    gates: tuple[Gate, ...] = ()
    engine: Literal["ft", "vllm"] = "ft"
    batch_size: int | None = None
    output: Path | None = None
    dtype: Dtype | None = None


def evaluate(
    named: ModelRef,
    options: EvaluationOptions = EvaluationOptions(),
    against: ModelRef | Literal["base"] | None = None,
    on_event: EventHandler = ignore,
) -> EvaluationResult:
    """Evaluate a run or a model; results are written to `eval/` of a run, or to `options.output`.

    Args:
        named: The run or model.
        options: Tasks, gates and engine.
        against: The model to compare with; "base" is the base that the run was trained on.
        on_event: Receives an event at every phase.

    Raises:
        EnvironmentFault: The results cannot be written.
        DataError: There are no rows, or one cannot be used.
        UsageError: A task or a metric of a gate does not exist, or the model has no base; or losses of models with
            different tokens would be compared.
        FinetuneError: A model cannot be opened.
    """
    run = RunDirectory(named.path) if named.kind is Kind.RUN else None
    folder = options.output or (run.evaluation if run else None)
    if folder is not None:
        check_output(folder, overwrite=True, is_folder=True)
    finetuned = FineTunedModel.find(named, on_event, options.dtype)
    other = _in_one_type(finetuned, _other(finetuned, against, options.dtype, on_event))
    tasks = _tasks(named, finetuned, options.tasks, on_event)
    _refuse_idle_gates(options.gates, tasks)
    if other:
        _refuse_other_tokens(finetuned, other, tasks)
    # Theirs first: on a shared base, the base itself is measured before the adapter is attached to it.
    models = [other, finetuned] if other else [finetuned]
    # All generators before the first measurement: a model that vLLM refuses is an error at once.
    generators = [vllm_generator(each, on_event) if options.engine == "vllm" else None for each in models]
    *before, ours = _measured(models, generators, tasks, options, on_event)
    theirs = before[0] if before else None
    result = EvaluationResult(
        label=named.label,
        against=other.label if other else None,
        generation_backend=(generators[-1] or ModelGenerator).name,
        compute_dtype=dtype_name(finetuned.setup.compute_dtype),
        generation_dtype=dtype_name(finetuned.setup.compute_dtype if generators[-1] else finetuned.generation_dtype),
        scores=_scores(tasks, ours, theirs),
        classes=_classes(tasks, ours, theirs),
    )
    result.gates.extend(_gate_results(options.gates, result))
    if folder is not None:
        with recording_errors(run) if run else nullcontext():
            _write(folder, result, tasks, ours, theirs)
    return replace(result, folder=folder)


def _other(
    finetuned: FineTunedModel,
    against: ModelRef | Literal["base"] | None,
    dtype: Dtype | None,
    on_event: EventHandler,
) -> FineTunedModel | None:
    if isinstance(against, ModelRef):
        return FineTunedModel.find(against, on_event, dtype)
    if against == "base" and finetuned.trained is None:
        raise UsageError(
            "this is a plain model, which has no base",
            where=finetuned.label,
            hint="name the model to compare with: --against MODEL",
        )
    return finetuned.untuned if against else None


def _in_one_type(finetuned: FineTunedModel, other: FineTunedModel | None) -> FineTunedModel | None:
    """The model to compare with, computing in the type of the evaluated one: types differ by 1e-3 nats."""
    if other is None:
        return None
    setup, theirs = finetuned.setup, other.setup
    weights = setup.weight_dtype if theirs.section.dtype == "auto" else theirs.weight_dtype
    if (theirs.compute_dtype, theirs.weight_dtype) == (setup.compute_dtype, weights):
        return other
    if theirs.compute_dtype is not setup.compute_dtype:
        logger.warning(
            "%s computes in %s here, as %s does; by itself it computes in %s",
            other.label,
            dtype_name(setup.compute_dtype),
            finetuned.label,
            dtype_name(theirs.compute_dtype),
        )
    return replace(other, setup=replace(theirs, compute_dtype=setup.compute_dtype, weight_dtype=weights))


def _tasks(named: ModelRef, finetuned: FineTunedModel, names: Sequence[str], on_event: EventHandler) -> list[Task]:
    """The tasks of these names; without names, all tasks of the recipe."""
    context = finetuned.setup if isinstance(finetuned.setup, TrainingContext) else None
    own = {section.name: section for section in context.recipe.evaluation.tasks} if context else {}
    if not names:
        validation = [task for task in [_validation(context, on_event)] if task]
        if not validation and not own:
            raise _nothing_to_measure(named, context)
        return [*validation, *(_built(section, context, on_event) for section in own.values())]
    tasks: list[Task] = []
    current = list(map(current_task_name, names))
    for index, name in enumerate(current):
        if name == VALIDATION and name in current[:index]:
            continue  # `held_out` and `validation` are two spellings of one task
        if name == VALIDATION:
            task = _validation(context, on_event)
            if task is None:
                raise _nothing_to_measure(named, context)
            tasks.append(task)
        elif name in own:
            tasks.append(_built(own[name], context, on_event))
        else:
            tasks += map(build, _named_elsewhere(name))
    if twice := next((task.name for task in tasks if [each.name for each in tasks].count(task.name) > 1), None):
        raise UsageError("two tasks have this name", where=f"--tasks {twice}", hint="rename one of them")
    return tasks


def _built(section: TaskSection, context: TrainingContext | None, on_event: EventHandler) -> Task:
    """A task of a recipe, with the validation rows where it has no rows of its own."""
    if not isinstance(section, RowsTask) or section.data is not None:
        task: Task = build(section)
        return task
    assert context is not None, "a recipe has tasks without rows"
    on_validation: Task = build(section, context.read_data(on_event).validation)
    return on_validation


def _named_elsewhere(name: str) -> list[TaskSection]:
    """The tasks of a file, or a task of the harness."""
    if name.endswith((".yaml", ".yml")) or Path(name).is_file():
        return load_tasks(Path(name))
    return [HarnessTask(name=name, kind="lm_eval")]


def _validation(context: TrainingContext | None, on_event: EventHandler) -> ValidationTask | None:
    if context is None or not (context.recipe.data.validation or context.recipe.data.validation_fraction):
        return None
    rows = context.read_data(on_event).validation
    return ValidationTask(rows, context.recipe.evaluation, context.recipe.data.train_on) if len(rows) else None


def _nothing_to_measure(named: ModelRef, context: TrainingContext | None) -> DataError | UsageError:
    if context is None:
        return UsageError(
            "only runs and checkpoints have a recipe with validation rows",
            where=named.given,
            hint="name tasks: --tasks tasks.yaml, or a task of lm-evaluation-harness",
        )
    return DataError(
        "the recipe has no validation rows",
        where=str(named.path),
        hint="train with data.validation or data.validation_fraction, or name a task: --tasks tasks.yaml",
    )


def _refuse_idle_gates(gates: Sequence[Gate], tasks: Sequence[Task]) -> None:
    """Report a typo in a gate before any measurement.

    Tasks of the harness have no list of metrics: with one of them, gates are matched after the measurement.
    """
    if all(task.metrics is not None for task in tasks):
        names = [f"{task.name}/{metric}" for task in tasks for metric in task.metrics or ()]
        for gate in gates:
            gate.matching(names)


def _refuse_other_tokens(finetuned: FineTunedModel, other: FineTunedModel, tasks: Sequence[Task]) -> None:
    ours, theirs = (each.setup.tokenizer.backend_tokenizer.to_str() for each in (finetuned, other))
    losses = [task.name for task in tasks if task.has_loss]
    # The full tokenizers, not the vocabularies: other merges or special tokens split text differently.
    if losses and ours != theirs:
        raise UsageError(
            f"losses per token of models with different tokens cannot be compared, and {losses[0]} measures one",
            where=other.label,
            hint="name tasks of kind generate or choose: --tasks",
        )


def _measured(
    models: Sequence[FineTunedModel],
    generators: Sequence[Generator | None],
    tasks: Sequence[Task],
    options: EvaluationOptions,
    on_event: EventHandler,
) -> list[list[Measurement]]:
    """The measurements of each model, in order. Models over one base load it once and attach their adapters in turn."""
    shares_base = len({id(each.setup) for each in models}) == 1
    found: list[list[Measurement]] = []
    for group in [list(models)] if shares_base else [[each] for each in models]:
        base = _lazy_base(group, on_event)
        for number, finetuned in enumerate(group):
            engine = _engine(finetuned, base, number, generators[len(found)], options, on_event)
            with closing(engine.generator):
                found.append([task.measure(engine, options.limit, on_event) for task in tasks])
    return found


def _lazy_base(models: Sequence[FineTunedModel], on_event: EventHandler) -> Callable[[], SharedBase]:
    """A loader of the models' base that loads it at the first call: never, if the cache has every prediction."""
    return cache(lambda: SharedBase(models, on_event))


def _engine(
    finetuned: FineTunedModel,
    base: Callable[[], SharedBase],
    number: int,
    generator: Generator | None,
    options: EvaluationOptions,
    on_event: EventHandler,
) -> Engine:
    """The engine of model `number` of a base; without a generator, answers are generated by ft."""
    setup = finetuned.setup
    section = setup.recipe.evaluation if isinstance(setup, TrainingContext) else Evaluation()
    batch_size = options.batch_size or section.batch_size
    limit = setup.positions.after(finetuned.prompt_tokens)

    ends = end_tokens(generation_settings(setup.folder.path), setup.tokenizer, finetuned.answer_ends)

    def load() -> nn.Module:
        return base().model(number)

    return Engine(
        label=finetuned.label,
        tokenizer=setup.tokenizer,
        uses_chat_template=finetuned.uses_chat_template,
        load=load,
        generator=generator or ModelGenerator(load, setup.tokenizer, batch_size, setup.padding, finetuned.answer_ends),
        decoder=AnswerDecoder(setup.tokenizer, ends),
        cache=PredictionCache(_identity(finetuned, on_event)),
        compute_dtype=setup.compute_dtype,
        batch_size=batch_size,
        padding=setup.padding,
        may_share=lambda: base().supports_prefix_sharing(number),
        limit=replace(limit, is_table=True) if generator else limit,  # vLLM reserves memory for no longer rows
    )


def _identity(finetuned: FineTunedModel, on_event: EventHandler) -> dict[str, Any]:
    """Everything that predictions depend on: the key of the prediction cache."""
    setup = finetuned.setup
    folder = setup.base_folder(on_event).path
    quantizers = setup.quantizers
    return {
        "base": fingerprint(folder),
        "settings": {name: file_digest(folder / name) for name in SETTINGS if (folder / name).is_file()},
        "tokenizer": hashlib.sha256(setup.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "answer_ends": finetuned.answer_ends,
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
        return [fingerprint_files(trained_files(trained.weights)), trained.method.section.model_dump(mode="json")]
    except ValueError as error:
        raise RefusedError(
            f"a file of the trained weights is damaged: {error}",
            where=str(trained.weights),
            hint="train the run again, or restore a good copy",
        ) from error


def _scores(
    tasks: Sequence[Task], ours: Sequence[Measurement], theirs: Sequence[Measurement] | None
) -> dict[str, dict[str, Score]]:
    return {task.name: _scores_of(mine, other) for task, mine, other in zip_longest(tasks, ours, theirs or ())}


def _classes(
    tasks: Sequence[Task], ours: Sequence[Measurement], theirs: Sequence[Measurement] | None
) -> dict[str, ComparedClasses]:
    return {
        task.name: ComparedClasses(mine.classes, other.classes if other else None)
        for task, mine, other in zip_longest(tasks, ours, theirs or ())
        if mine.classes
    }


def _scores_of(ours: Measurement, theirs: Measurement | None) -> dict[str, Score]:
    others = {column.metric.name: column for column in theirs.columns} if theirs else {}
    scores = {}
    for column in ours.columns:
        other = others.get(column.metric.name)
        scores[column.metric.name] = Score(
            unit=column.metric.unit,
            rows=len(column.rows),
            ours=interval(column),
            theirs=interval(other) if other else None,
            difference=difference(column, other) if other else None,
        )
    for name, value in ours.further.items():
        other_value = theirs.further.get(name) if theirs else None
        # Scores without rows have no interval: both ends are the value.
        point = None if other_value is None else Interval(other_value, other_value, other_value)
        scores[name] = Score("nats", None, Interval(value, value, value), point, None)
    return scores


def _gate_results(gates: Sequence[Gate], result: EvaluationResult) -> Iterator[GateResult]:
    values = {
        f"{task}/{metric}": score.ours.value
        for task, scores in result.scores.items()
        for metric, score in scores.items()
    }
    for gate in gates:
        for name in gate.matching(list(values)):
            yield GateResult(gate.text, name, values[name], gate.holds(values[name]))


def _write(
    folder: Path,
    result: EvaluationResult,
    tasks: Sequence[Task],
    ours: Sequence[Measurement],
    theirs: Sequence[Measurement] | None,
) -> None:
    """Write `results.json`, and the answer to each row into `generations.jsonl`."""
    with written_aside(folder) as aside:  # old results stay until the new ones are complete
        write_json(aside / "results.json", result.to_json())
        with open_to_write(aside / "generations.jsonl") as file:
            for task, mine, other in zip_longest(tasks, ours, theirs or ()):
                for record, reference in zip_longest(mine.records, other.records if other else ()):
                    against = {"against": {key: reference[key] for key in ("answer", "scores")}} if reference else {}
                    line = json.dumps({"task": task.name, **record, **against}, ensure_ascii=False)
                    file.write(line.encode() + b"\n")

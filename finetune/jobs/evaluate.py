"""`ft eval`: the base model and the run on the same held-out rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from torch import nn

from finetune.data.encode import Example, Prompt
from finetune.errors import DataError
from finetune.evaluation.generation import Sampling, generate
from finetune.evaluation.loss import held_out_loss
from finetune.evaluation.metrics import best_of, exact_match, token_f1
from finetune.jobs.setup import Workbench
from finetune.jobs.trained import TrainedRun
from finetune.report.run_page import reported
from finetune.run.directory import RunDirectory, write_json, written_aside
from finetune.run.events import Progress, Report, ignore


@dataclass(frozen=True)
class Scores:
    """What one model reaches on the held-out rows.

    Attributes:
        metrics: By name: `loss` in nats per trained token, `perplexity`, `exact_match` and `f1` in [0, 1].
        answers: The generated answers, in the order of the prompts.
    """

    metrics: dict[str, float]
    answers: list[str]


@dataclass(frozen=True)
class Comparison:
    """Two models on the same rows.

    Attributes:
        rows: Held-out rows of the loss.
        answered: Held-out rows that were answered by generation.
        base: The model before training.
        tuned: The model after it.
    """

    rows: int
    answered: int
    base: Scores
    tuned: Scores

    def to_json(self) -> dict[str, object]:
        """Both models' metrics and their differences."""
        return {
            "rows": self.rows,
            "answered": self.answered,
            "base": self.base.metrics,
            "tuned": self.tuned.metrics,
            "difference": {name: self.tuned.metrics[name] - value for name, value in self.base.metrics.items()},
        }


def evaluate(run: RunDirectory, report: Report = ignore) -> Comparison:
    """Measure loss and generated answers of the base and of the run; results go to the run's `eval/`.

    Raises:
        DataError: The recipe holds no rows out.
        FinetuneError: The run cannot be opened.
    """
    trained = TrainedRun.open(run, report)
    bench = trained.bench
    settings = bench.recipe.evaluation
    held_out = bench.read_data(report).validation
    if not len(held_out):
        raise DataError(
            "the recipe holds no rows out",
            where=str(run.recipe),
            hint="train with data.validation or data.validation_fraction",
        )
    examples = held_out[: settings.max_rows]
    asked = (bench.encoder.prompt(row.document, row.where) for row in held_out.documents())
    prompts = list(islice((prompt for prompt in asked if prompt is not None), settings.generation_rows))

    base = trained.load_base(report)
    before = _score(bench, base, "base", examples, prompts, report)
    tuned = _score(bench, trained.attach(base, report), "tuned", examples, prompts, report)
    comparison = Comparison(rows=len(examples), answered=len(prompts), base=before, tuned=tuned)
    _write(run, comparison, prompts, bench)
    return comparison


def _score(
    bench: Workbench,
    model: nn.Module,
    name: str,
    examples: Sequence[Example],
    prompts: Sequence[Prompt],
    report: Report,
) -> Scores:
    settings = bench.recipe.evaluation
    held_out = held_out_loss(
        model,
        examples,
        accelerator=bench.accelerator,
        compute_dtype=bench.compute_dtype,
        batch_size=settings.batch_size,
        padding=bench.padding,
        report_rows=lambda done: report(Progress(f"{name}: held-out loss", done, len(examples))),
    )
    metrics = {"loss": held_out.loss, "perplexity": held_out.perplexity}
    if not prompts:
        return Scores(metrics, [])
    answers = generate(
        model,
        bench.tokenizer,
        [prompt.ids for prompt in prompts],
        Sampling(max_new_tokens=settings.max_new_tokens),
        batch_size=settings.batch_size,
        padding=bench.padding,
        report_rows=lambda done: report(Progress(f"{name}: answers", done, len(prompts))),
    )
    pairs = [(answer, prompt.references) for answer, prompt in zip(answers, prompts, strict=True)]
    for name, metric in (("exact_match", exact_match), ("f1", token_f1)):
        metrics[name] = sum(best_of(metric, *pair) for pair in pairs) / len(pairs)
    return Scores(metrics, answers)


def _write(run: RunDirectory, comparison: Comparison, prompts: Sequence[Prompt], bench: Workbench) -> None:
    """Write `results.json` and every generated answer beside its reference."""
    with reported(run), written_aside(run.evaluation) as folder:
        write_json(folder / "results.json", comparison.to_json())
        with (folder / "generations.jsonl").open("w", encoding="utf-8") as file:
            answers = zip(prompts, comparison.base.answers, comparison.tuned.answers, strict=True)
            for prompt, base, tuned in answers:
                text = bench.tokenizer.decode(prompt.ids)
                record = {"prompt": text, "references": prompt.references, "base": base, "tuned": tuned}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

"""Tasks of lm-evaluation-harness have the scores of its own class for transformers, without a network."""

from __future__ import annotations

import builtins
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing

from finetune.errors import UnsupportedError, UsageError
from finetune.evaluation.engine import Engine, ModelGenerator
from finetune.evaluation.generation import AnswerDecoder
from finetune.evaluation.measurement import Measurement
from finetune.evaluation.prediction_cache import PredictionCache
from finetune.jobs.load.finetuned_model import FineTunedModel, SharedBase
from finetune.jobs.load.model_ref import resolve_model_refs
from finetune.jobs.train.run import train
from finetune.models.loading import dtype
from finetune.models.loading.positions import PositionLimit
from finetune.recipe.sections.evaluation import HarnessTask
from finetune.run.directory import RunDirectory
from finetune.run.events import ignore
from tests.fixtures.eval_helpers import evaluated
from tests.fixtures.recipes import as_recipe
from tests.fixtures.tiny import write_tiny_model

WORDS = [*"abcdefghijklmnop", "cat", "dog", "mat", "red", "blue", "hills", "food"]
TASKS: dict[str, dict[str, Any]] = {
    "ft_choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "num_fewshot": 1,
        "fewshot_split": "test",
        "metric_list": [{"metric": name, "aggregation": "mean"} for name in ("acc", "acc_norm")],
    },
    "ft_letters": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean"}],
    },
    "ft_answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e", "\n\n"], "do_sample": False, "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean"}, {"metric": "chrf", "aggregation": "chrf"}],
    },
    "ft_texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{long}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


def text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words))


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The harness with the four tasks above only, on local rows."""
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(dtype, "_has_bfloat16", lambda device: False)
    draw = random.Random(0)
    rows = [
        {
            "question": text(draw, draw.randint(2, 12)),
            "choices": [text(draw, draw.randint(1, 4)) for _ in range(4)],
            "answer": row % 4,
            "long": text(draw, 40 * (1 + row % 4)),  # the longest in several windows
        }
        for row in range(10)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, section in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
        (tmp_path / f"{name}.yaml").write_text(
            yaml.safe_dump({"task": name, "test_split": "test", **source, **section})
        )
    found = partial(tasks.TaskManager, include_path=str(tmp_path), include_defaults=False)  # thousands of files
    monkeypatch.setattr(tasks, "TaskManager", found)
    return found


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "base", tie_word_embeddings=False, initializer_range=0.3)
    return tmp_path / "base"


def engine_of(name: Path, batch_size: int = 4) -> Engine:
    tuned = FineTunedModel.find(resolve_model_refs([str(name)])[0], ignore)
    shared = SharedBase([tuned], ignore)
    return Engine(
        label=tuned.label,
        tokenizer=tuned.setup.tokenizer,
        uses_chat_template=tuned.uses_chat_template,
        load=lambda: shared.model(0),
        generator=ModelGenerator(lambda: shared.model(0), tuned.setup.tokenizer, batch_size, tuned.setup.padding),
        decoder=AnswerDecoder(tuned.setup.tokenizer, []),
        cache=PredictionCache({"name": str(name), "batch": batch_size}),
        compute_dtype=torch.float32,
        batch_size=batch_size,
        padding=tuned.setup.padding,
        may_share=partial(shared.supports_prefix_sharing, 0),
        limit=PositionLimit(512),
    )


def measured(name: str, engine: Engine, chat_template: bool, limit: int | None = None) -> Measurement:
    from finetune.evaluation.harness import Harness

    section = HarnessTask(name=name, kind="lm_eval", chat_template=chat_template)
    return Harness(section).measure(engine, limit, ignore)


def scores(found: Measurement) -> dict[str, float]:
    return {column.metric.name: column.value for column in found.columns} | found.further


@pytest.mark.parametrize("chat_template", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_harness_scores_equal_those_of_lm_eval(manager: Any, base: Path, name: str, chat_template: bool):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    theirs = simple_evaluate(
        model=HFLM(pretrained=str(base), dtype="float32", device="cpu", batch_size=4),
        tasks=[name],
        task_manager=manager(),
        apply_chat_template=chat_template,
        bootstrap_iters=0,
    )
    found = measured(name, engine_of(base), chat_template)
    results = theirs["results"][name]
    expected = {metric["metric"]: results[f"{metric['metric']},none"] for metric in TASKS[name]["metric_list"]}
    assert scores(found) == pytest.approx(expected, rel=1e-5)
    for ours, sample in zip(found.records, theirs["samples"][name], strict=True):
        assert ours["prompt"] == str(sample["arguments"][0][0])
        if name == "ft_answers":
            assert ours["answer"] == sample["filtered_resps"]


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix_tuning"])
def test_harness_evaluates_adapters_and_soft_prompts_with_the_chat_template(
    manager: Any, tiny_recipe: dict[str, Any], tmp_path: Path, method: str
):
    run = RunDirectory.create(tmp_path / "run")
    tiny_recipe["optimizer"]["learning_rate"] = 0.3
    train(as_recipe({**tiny_recipe, "adapter": {"method": method}}, tmp_path), run)
    found = evaluated(run, "base", tasks=("ft_choices", "ft_texts"), limit=4)
    choices, perplexity = found.scores["ft_choices"]["acc"], found.scores["ft_texts"]["word_perplexity"]
    assert (choices.rows, choices.unit) == (4, "share")
    assert choices.difference is not None
    assert perplexity.theirs is not None
    assert perplexity.ours.value != pytest.approx(perplexity.theirs.value, rel=1e-3)
    records = [json.loads(line) for line in (run.evaluation / "generations.jsonl").read_text().splitlines()]
    assert records[0]["prompt"].startswith("<|begin|><|turn|>user\n")


def test_requests_hold_no_end_of_text_that_the_tokenizer_appends(manager: Any, base: Path):
    from finetune.evaluation.harness_model import InMemory

    model = InMemory(engine_of(base), lambda done, total: None)
    special = [(token, model.tokenizer.convert_tokens_to_ids(token)) for token in ("<|begin|>", "<|end|>")]
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=special
    )
    bare = model.tokenizer("snow is", add_special_tokens=False)["input_ids"]
    assert model.tokenizer("snow is")["input_ids"] == [256, *bare, 257]
    assert model.tok_encode("snow is") == [256, *bare]
    assert model.tok_encode("<|begin|>snow is") == [256, *bare]
    assert model.tok_encode("snow is", add_special_tokens=False) == bare
    context, continuation = model._encode_pair("snow is", " white")
    assert context + continuation == [256, *model.tokenizer("snow is white", add_special_tokens=False)["input_ids"]]


def test_harness_task_is_cached(manager: Any, base: Path, monkeypatch: pytest.MonkeyPatch):
    engine = engine_of(base)
    first = scores(measured("ft_answers", engine, False))
    monkeypatch.setattr("finetune.evaluation.engine.generate", None)
    assert scores(measured("ft_answers", engine, False)) == first


def test_harness_group_has_scores_per_row(manager: Any, base: Path, tmp_path: Path):
    group = {
        "group": "ft_group",
        "task": ["ft_choices", "ft_letters"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
    }
    (tmp_path / "ft_group.yaml").write_text(yaml.safe_dump(group))
    found = measured("ft_group", engine_of(base), False)
    (total, *parts) = found.columns
    assert [column.metric.name for column in found.columns] == [
        "acc",
        "ft_choices/acc",
        "ft_choices/acc_norm",
        "ft_letters/acc",
    ]
    assert len(total.rows) == 20
    assert {row.partition("/")[0] for row in total.rows} == {"ft_choices", "ft_letters"}
    assert total.value == pytest.approx((parts[0].value + parts[2].value) / 2)
    assert len(found.records) == 20


def test_unsupported_generation_settings_are_refused(manager: Any, base: Path, tmp_path: Path):
    section = {**TASKS["ft_answers"], "generation_kwargs": {"until": ["a"], "num_beams": 4}, "task": "ft_beams"}
    source = yaml.safe_load((tmp_path / "ft_answers.yaml").read_text())
    (tmp_path / "ft_beams.yaml").write_text(yaml.safe_dump({**source, **section}))
    with pytest.raises(UnsupportedError, match="num_beams"):
        measured("ft_beams", engine_of(base), False)


def test_unknown_task_is_an_error_with_suggestions(manager: Any, base: Path):
    with pytest.raises(UsageError, match="neither a task of the recipe") as caught:
        evaluated(base, tasks=("ft_chioces",))
    assert "ft_choices" in str(caught.value.hint)


def test_missing_lm_eval_is_an_error_with_a_hint(base: Path, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "lm_eval":
            raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="package lm_eval is missing") as caught:
        evaluated(base, tasks=("arc_easy",))
    assert "pip install" in str(caught.value.hint)

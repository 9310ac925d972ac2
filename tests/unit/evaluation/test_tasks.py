"""Tasks: the scored part of an answer, and reserved names."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from finetune.data.bad_rows import EMPTY
from finetune.data.encode import Example
from finetune.data.text_tokens import prompt_ids
from finetune.errors import BadRow, DataError, RecipeError
from finetune.evaluation.choices import Choose
from finetune.evaluation.generation import AnswerDecoder
from finetune.evaluation.tasks import Generate
from finetune.models.loading.positions import PositionLimit
from finetune.recipe.load import load_tasks
from finetune.recipe.sections.evaluation import ChooseTask, GenerateTask
from finetune.run.events import ignore
from tests.fixtures.templates import family_tokenizer
from tests.fixtures.tiny import tiny_tokenizer


@pytest.mark.parametrize("reference", ["Ann", "<think>\nShe sings.\n</think>\n\nAnn"])
@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("Ann", True),
        ("<think>\nBob? No.\n</think>\n\nAnn", True),
        ("<think>\nAnn\n</think>\n\nBob", False),
        ("<think>\nAnn", False),
    ],
)
def test_reasoning_is_not_part_of_the_scored_answer(answer: str, is_right: bool, reference: str, tmp_path: Path):
    rows = [{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": reference}]}]
    (tmp_path / "rows.jsonl").write_text("".join(map(json.dumps, rows)))
    section = {"name": "who", "kind": "generate", "data": {"path": str(tmp_path / "rows.jsonl"), "format": "chat"}}
    engine: Any = SimpleNamespace(
        tokenizer=family_tokenizer("qwen3"),
        decoder=AnswerDecoder(family_tokenizer("qwen3"), []),
        limit=PositionLimit(None),
        label="fake",
        answers=lambda *arguments: [answer],
    )
    task = Generate(TypeAdapter(GenerateTask).validate_python(section | {"metrics": ["exact_match"]}))
    (record,) = task.measure(engine, None, ignore).records
    assert record["answer"] == answer
    assert record["scores"] == {"exact_match": float(is_right)}


def ending_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose post-processor begins and ends every text."""
    tokenizer = tiny_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|begin|>", "<|end|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=special
    )
    return tokenizer


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), ending_tokenizer()], ids=["plain", "ending"])
@pytest.mark.parametrize("space", ["", " ", "\n"])
def test_choices_of_plain_text_are_measured_behind_the_prompt_as_trained(
    space: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    """The measured tokens are the choice with the row's space before it; the prompt holds no end of text."""
    row = {"prompt": "snow is", "completion": f"{space}white"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    seen: list[Example] = []

    def likelihoods(examples: list[Example], on_progress: Any) -> list[SimpleNamespace]:
        seen.extend(examples)
        return [SimpleNamespace(log_prob=-float(index)) for index in range(len(examples))]

    engine: Any = SimpleNamespace(tokenizer=tokenizer, limit=PositionLimit(None), label="fake", likelihoods=likelihoods)
    section = {"name": "pick", "kind": "choose", "choices": ["white", "black"]}
    source = {"path": str(tmp_path / "rows.jsonl"), "format": "completion"}
    task = Choose(TypeAdapter(ChooseTask).validate_python({**section, "data": source}))
    (record,) = task.measure(engine, None, ignore).records
    assert record["scores"] == {"accuracy": 1, "accuracy_norm": 1}
    for example, choice in zip(seen, ["white", "black"], strict=True):
        trained = [index for index, is_target in enumerate(example.is_target) if is_target]
        assert tokenizer.decode([example.ids[index] for index in trained]) == space + choice
        prompt = example.ids[: trained[0]]
        assert prompt == prompt_ids(tokenizer, "snow is")
        assert tokenizer.eos_token_id not in example.ids


@pytest.mark.parametrize("name", ["validation", "held_out"])
def test_task_with_a_name_of_the_validation_rows_is_refused(name: str, tmp_path: Path):
    (tmp_path / "tasks.yaml").write_text(
        f"evaluation: {{tasks: [{{name: {name}, kind: loss, data: {{path: rows.jsonl, format: text}}}}]}}"
    )
    with pytest.raises(RecipeError, match="validation rows"):
        load_tasks(tmp_path / "tasks.yaml")


def rows_file(folder: Path, row: dict[str, Any]) -> str:
    (folder / "rows.jsonl").write_text(json.dumps(row))
    return str(folder / "rows.jsonl")


@pytest.mark.parametrize("answer", [{"content": None}, {"content": " "}, {"content": "", "reasoning_content": "a"}])
def test_empty_reference_answer_is_refused(answer: dict[str, Any], tmp_path: Path):
    path = rows_file(tmp_path, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", **answer}]})
    section = {"name": "a", "kind": "generate", "data": {"path": path, "format": "chat"}}
    engine: Any = SimpleNamespace(tokenizer=tiny_tokenizer(), limit=PositionLimit(None), label="fake")
    with pytest.raises(BadRow) as caught:
        Generate(TypeAdapter(GenerateTask).validate_python(section)).measure(engine, None, ignore)
    assert (caught.value.reason, caught.value.where) == (EMPTY, f"{path}:1")


def test_task_row_of_another_format_hints_at_its_section(tmp_path: Path):
    path = rows_file(tmp_path, {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})
    section = {"name": "a", "kind": "generate", "data": {"path": path, "format": "chat"}}
    engine: Any = SimpleNamespace(tokenizer=tiny_tokenizer(), positions=None, label="fake")
    with pytest.raises(DataError) as caught:
        Generate(TypeAdapter(GenerateTask).validate_python(section)).measure(engine, None, ignore)
    assert "{format: sharegpt}" in str(caught.value.hint)


def test_key_of_a_source_beside_data_belongs_below_it(tmp_path: Path):
    (tmp_path / "tasks.yaml").write_text("[{name: a, kind: loss, path: rows.jsonl, data: {path: b.jsonl}}]")
    with pytest.raises(RecipeError) as caught:
        load_tasks(tmp_path / "tasks.yaml")
    (problem,) = caught.value.problems
    assert "data: {path: ...}" in str(problem.hint)

"""A run keeps its tokenizer, chat template, date and ends: evaluation, generation, merge, resume and reproduction."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from finetune.data.documents import Conversation, Message
from finetune.data.encode import Encoder
from finetune.errors import FinetuneError, ModelError, RefusedError
from finetune.jobs.export.merge import merge
from finetune.jobs.export.peft_adapter import export_adapter
from finetune.jobs.infer.evaluate import evaluate
from finetune.jobs.load import finetuned_model
from finetune.jobs.load.finetuned_model import FineTunedModel
from finetune.jobs.plan.preview import preview
from finetune.jobs.train import prepare
from finetune.jobs.train.reproduce import reproduce
from finetune.jobs.train.run import train
from finetune.models.loading import load
from finetune.run.directory import RunDirectory
from tests.fixtures.generate_helpers import tuned
from tests.fixtures.recipes import as_recipe
from tests.fixtures.tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_llama, tiny_tokenizer

DATED = "{{ bos_token }}<|turn|>system\n{{ strftime_now('%d %B %Y, %H:%M:%S') }}<|end|>\n" + CHAT_TEMPLATE.removeprefix(
    "{{ bos_token }}"
)
THINKS = "{% if think is not defined or think %}{{ 'Think first. ' }}{% endif %}" + CHAT_TEMPLATE
QUESTION = Conversation((Message("user", "Say 7 twice"), Message("assistant", "7 7")))
KINDS = ["lora", "full"]
CHANGED = "has changed since the run was trained"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base of the test's own, whose files may be changed."""
    folder = tmp_path / "base"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def sections(tiny_recipe: dict[str, Any], base: Path) -> dict[str, Any]:
    """The sections of a recipe over that base, with a checkpoint of its second step."""
    tiny_recipe["model"] = {"name": str(base)}
    tiny_recipe["training"]["checkpoint_every_steps"] = 2
    return tiny_recipe


def set_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def trained(sections: dict[str, Any], folder: Path, *overrides: str, name: str = "run") -> RunDirectory:
    run = RunDirectory.create(folder / name)
    train(as_recipe(sections, folder, overrides), run)
    return run


def method(kind: str) -> list[str]:
    return ["adapter={method: full}"] if kind == "full" else []


def weights(run: RunDirectory, kind: str) -> Path:
    return run.trained(kind == "full")


def prompted(found: FineTunedModel) -> str:
    """The text that a model is asked with."""
    prompt = Encoder(found.setup.tokenizer, "assistant").prompt(QUESTION, "here")
    assert prompt is not None
    return str(found.setup.tokenizer.decode(prompt.ids))


def checkpoint(run: RunDirectory) -> Path:
    return sorted(run.checkpoints.iterdir())[-1]


@pytest.fixture
def on_day(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the current date."""

    def at(day: str) -> None:
        fixed = type("Fixed", (date,), {"today": classmethod(lambda cls: date.fromisoformat(day))})
        for module in (load, prepare, finetuned_model):
            monkeypatch.setattr(module, "date", fixed)

    return at


# --- template and tokenizer of the run


@pytest.mark.parametrize("kind", KINDS)
def test_run_of_a_base_with_another_template_by_now_keeps_its_own(
    kind: str, sections: dict[str, Any], base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run = trained(sections, tmp_path, *method(kind))
    before = prompted(tuned(run.path)[0])
    set_template(base, CHAT_TEMPLATE.replace("<|turn|>", "<|turn|>as "))
    copied = shutil.copytree(weights(run, kind), tmp_path / "copied")
    with caplog.at_level(logging.WARNING, logger="finetune"):
        for name in (run.path, checkpoint(run), copied):
            caplog.clear()
            assert prompted(tuned(name)[0]) == before
            # The copied weights of full fine-tuning are a model of their own.
            is_alone = kind == "full" and name is copied
            assert sum(CHANGED in text for text in caplog.messages) == (not is_alone), name
    assert "the base's chat template has" in caplog.text or kind == "full"


def test_run_of_an_unchanged_base_warns_of_nothing(
    sections: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run = trained(sections, tmp_path, "model.chat_template=mistral")
    with caplog.at_level(logging.WARNING, logger="finetune"):
        tuned(run.path, checkpoint(run))
    assert not [text for text in caplog.messages if "changed" in text]


def test_run_of_a_base_with_another_tokenizer_by_now_keeps_its_own(
    sections: dict[str, Any], base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run = trained(sections, tmp_path)
    before = tuned(run.path)[0].setup.tokenizer("Hi")["input_ids"]
    other = byte_tokenizer(["<|end|>", "<|begin|>", "<|turn|>"], CHAT_TEMPLATE)  # other ids for the same tokens
    other.save_pretrained(base)
    with caplog.at_level(logging.WARNING, logger="finetune"):
        (found,) = tuned(run.path)
    assert found.setup.tokenizer.eos_token_id == tiny_tokenizer().eos_token_id
    assert found.setup.tokenizer("Hi")["input_ids"] == before
    assert f"the base's tokenizer {CHANGED}" in caplog.text


def test_run_of_a_base_without_tokenizer_by_now_uses_its_own(sections: dict[str, Any], base: Path, tmp_path: Path):
    run = trained(sections, tmp_path)
    before = prompted(tuned(run.path)[0])
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).unlink()
    assert prompted(tuned(run.path)[0]) == before


def test_run_without_a_copy_of_its_tokenizer_uses_the_base(sections: dict[str, Any], base: Path, tmp_path: Path):
    """Runs of earlier versions."""
    run = trained(sections, tmp_path)
    shutil.rmtree(run.tokenizer)
    (run.trained(False) / "tokenizer_config.json").unlink()
    set_template(base, "Now " + CHAT_TEMPLATE)
    assert all(prompted(found).startswith("Now") for found in tuned(run.path, checkpoint(run)))


def test_run_with_a_damaged_copy_of_its_tokenizer_is_refused(sections: dict[str, Any], tmp_path: Path):
    run = trained(sections, tmp_path)
    (run.trained(False) / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(RefusedError, match="tokenizer that the run keeps"):
        tuned(run.path)


def test_copy_of_a_tokenizer_with_more_tokens_than_embeddings_is_refused(sections: dict[str, Any], tmp_path: Path):
    run = trained(sections, tmp_path)
    larger = tiny_tokenizer()
    larger.add_tokens([f"<{number}>" for number in range(80)])
    larger.save_pretrained(run.trained(False))
    with pytest.raises(ModelError, match="embeddings"):
        tuned(run.path)


def test_resume_and_reproduction_of_a_run_over_a_changed_base_train_its_rows(
    sections: dict[str, Any], base: Path, tmp_path: Path
):
    run = trained(sections, tmp_path, name="resumed")
    other = trained(sections, tmp_path, name="repeated")
    once = trained(sections, tmp_path, "training.max_steps=5", name="once")
    set_template(base, CHAT_TEMPLATE.replace("<|turn|>", "<|turn|>as "))
    train(as_recipe(sections, tmp_path, ["training.max_steps=5"]), run)
    facts = [json.loads((checkpoint(each) / "MANIFEST.json").read_text())["facts"] for each in (run, once)]
    assert facts[0]["data"] == facts[1]["data"]
    assert reproduce(other, RunDirectory.create(tmp_path / "again")).is_identical


def test_merged_model_and_exported_adapter_have_the_template_of_the_run(
    sections: dict[str, Any], base: Path, tmp_path: Path
):
    run = trained(
        sections, tmp_path, 'data.template_arguments={tone: "dry \\" %}"}', f"model.chat_template={toned(tmp_path)}"
    )
    own = (run.trained(False) / "chat_template.jinja").read_text()
    assert '{%- set tone = "dry' in own
    set_template(base, "changed")
    for folder in (merge(run, tmp_path / "merged").folder, export_adapter(run, tmp_path / "exported")):
        assert AutoTokenizer.from_pretrained(folder).chat_template == own
    assert prompted(tuned(tmp_path / "merged")[0]).startswith('dry " %}')


def toned(folder: Path) -> Path:
    file = folder / "toned.jinja"
    file.write_text("{{ tone }}" + CHAT_TEMPLATE, encoding="utf-8")
    return file


def test_template_file_that_changes_or_vanishes_after_training_is_not_needed(
    sections: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file = toned(tmp_path)
    run = trained(sections, tmp_path, f"model.chat_template={file}", "data.template_arguments={tone: dry}")
    file.write_text("{{ tone }} " + CHAT_TEMPLATE, encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="finetune"):
        assert prompted(tuned(run.path)[0]).startswith("dry<|begin|>")
    assert f"model.chat_template ({file}) {CHANGED}" in caplog.text
    file.unlink()
    assert prompted(tuned(run.path)[0]).startswith("dry<|begin|>")


@pytest.mark.parametrize("kind", KINDS)
def test_base_without_a_template_trains_and_answers_with_a_family(
    kind: str, sections: dict[str, Any], base: Path, tmp_path: Path
):
    (base / "chat_template.jinja").unlink()
    alpaca = ["model.chat_template=alpaca", "data.max_length=512"]
    with pytest.raises(FinetuneError, match="no chat template"):
        preview(as_recipe(sections, tmp_path), 1)
    shown = preview(as_recipe(sections, tmp_path, alpaca), 1)
    assert shown.template == "alpaca (model.chat_template)"
    assert "### Response:\n" in "".join(stretch.text for stretch in shown.rows[0].stretches)
    run = trained(sections, tmp_path, *alpaca, *method(kind))
    assert all("### Response:\n" in prompted(each) for each in tuned(run.path, weights(run, kind), checkpoint(run)))


def test_template_arguments_are_part_of_the_run(sections: dict[str, Any], base: Path, tmp_path: Path):
    set_template(base, THINKS)
    run = trained(sections, tmp_path, "data.template_arguments={think: false}")
    assert all(prompted(each).startswith("<|begin|>") for each in tuned(run.path, checkpoint(run)))
    assert prompted(tuned(base)[0]).startswith("Think first.")


# --- one date


def test_run_resumed_on_another_day_trains_the_same_rows(
    sections: dict[str, Any],
    base: Path,
    tmp_path: Path,
    on_day: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
):
    set_template(base, DATED)
    on_day("2026-11-30")
    with caplog.at_level(logging.INFO, logger="finetune"):
        run = trained(sections, tmp_path)
    assert sum("this run keeps 2026-11-30" in text for text in caplog.messages) == 1
    on_day("2027-02-03")
    train(as_recipe(sections, tmp_path, ["training.max_steps=5"]), run)
    record = json.loads((run.trained(False) / "ft_adapter.json").read_text())
    assert record["today"] == "2026-11-30"
    assert json.loads(run.provenance.read_text())["template_date"] == "2026-11-30"


def test_run_reproduced_on_another_day_is_identical(
    sections: dict[str, Any], base: Path, tmp_path: Path, on_day: Callable[[str], None]
):
    set_template(base, DATED)
    on_day("2026-11-30")
    run = trained(sections, tmp_path)
    on_day("2026-12-01")
    assert reproduce(run, RunDirectory.create(tmp_path / "again")).is_identical
    # The control: a new run of that day has other rows.
    other = trained(sections, tmp_path, name="other")
    names = ["adapter_model.safetensors"]
    assert [(run.trained(False) / name).read_bytes() for name in names] != [
        (other.trained(False) / name).read_bytes() for name in names
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_run_is_asked_and_evaluated_with_the_date_of_its_training(
    kind: str, sections: dict[str, Any], base: Path, tmp_path: Path, on_day: Callable[[str], None]
):
    set_template(base, DATED)
    on_day("2026-11-30")
    run = trained(sections, tmp_path, *method(kind))
    on_day("2026-12-24")
    for found in tuned(run.path, checkpoint(run), weights(run, kind)):
        assert "30 November 2026, 00:00:00" in prompted(found)
    assert "24 December 2026" in prompted(tuned(base)[0])
    result = evaluate(finetuned_ref(run.path))
    prompts = [json.loads(line)["prompt"] for line in (run.evaluation / "generations.jsonl").read_text().splitlines()]
    assert prompts
    assert all("30 November 2026" in prompt for prompt in prompts)
    assert result.folder == run.evaluation


def finetuned_ref(path: Path) -> Any:
    from finetune.jobs.load.model_ref import resolve_model_refs

    return resolve_model_refs([str(path)])[0]


def test_date_is_not_recorded_where_the_template_writes_none(
    sections: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, logger="finetune"):
        run = trained(sections, tmp_path)
    assert "date" not in caplog.text
    assert json.loads((run.trained(False) / "ft_adapter.json").read_text())["today"] is None
    assert "template_date" not in json.loads(run.provenance.read_text())


# --- ends


def write_base_with_another_end(base: Path) -> None:
    """As a pretrained base has it: its end of text is not the token that its template ends turns with."""
    for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
        settings = json.loads((base / name).read_text())
        changes = {"eos_token": "<|begin|>"} if name.startswith("tok") else {"eos_token_id": 256}
        (base / name).write_text(json.dumps({**settings, **changes}))


@pytest.mark.parametrize("kind", KINDS)
def test_end_that_rows_train_is_recorded_and_told_before_training(
    kind: str, sections: dict[str, Any], base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write_base_with_another_end(base)
    told = "rows end answers with <|end|> (257), which the base's generation settings do not name"
    with caplog.at_level(logging.INFO, logger="finetune"):
        preview(as_recipe(sections, tmp_path), 1)
        assert told in caplog.text
        caplog.clear()
        run = trained(sections, tmp_path, *method(kind))
    assert told in caplog.text
    assert json.loads((weights(run, kind) / "ft_adapter.json").read_text())["answer_ends"] == [257]
    for found in tuned(run.path, checkpoint(run), weights(run, kind)):
        assert found.answer_ends == (257,)
        assert found.untuned.answer_ends == (257,)


def test_end_that_the_base_names_is_not_told(
    sections: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, logger="finetune"):
        run = trained(sections, tmp_path)
    assert "rows end answers" not in caplog.text
    assert tuned(run.path)[0].answer_ends == (257,)


def test_answers_end_where_rows_end_them_over_a_base_with_another_end(
    sections: dict[str, Any], base: Path, tmp_path: Path
):
    """All tokens train, so that without the recorded end the next turn follows."""
    write_base_with_another_end(base)
    rows = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "blue"}]}
    rows.write_text(json.dumps(row) + "\n")
    data = {"train": [{"path": str(rows)}], "validation": [{"path": str(rows)}], "max_length": 64, "train_on": "all"}
    changed = {**sections, "data": data, "adapter": {"method": "full"}}
    changed["training"] = {**sections["training"], "max_steps": 60, "micro_batch_size": 1}
    run = trained(changed, tmp_path, "training.gradient_accumulation_steps=1", "optimizer.schedule=constant")
    assert exact_match(run) == 1
    for name, ends in (("ft_adapter.json", {"answer_ends": []}), ("generation_config.json", {"eos_token_id": 256})):
        file = run.trained(True) / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **ends}))
    assert exact_match(run) == 0, "without the end, the answer goes on"


def exact_match(run: RunDirectory) -> float:
    return evaluate(finetuned_ref(run.path)).scores["validation"]["exact_match"].ours.value

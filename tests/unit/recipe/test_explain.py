"""What `ft explain` says of a key is what the schema says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from cli.views.recipe import explanation_lines
from finetune.errors import UsageError
from finetune.recipe.explain import explain_key, sections, values_in
from finetune.recipe.load import dump_recipe
from finetune.recipe.recipe import Recipe
from finetune.recipe.schema import every_key
from finetune.recipe.sections.section import OnResume

from .conftest import Load

KEYS = sorted({".".join(segment for segment in path if isinstance(segment, str)) for path in every_key()})


@pytest.mark.parametrize("key", KEYS)
def test_explain_covers_every_key_within_the_terminal_width(key: str):
    (explanation,) = explain_key(key)
    assert explanation.key == key
    assert all(meaning.what and meaning.values for meaning in explanation.meanings)
    assert all(len(meaning.kinds) == len(set(meaning.kinds)) for meaning in explanation.meanings)
    lines = explanation_lines([key], explanation, {"a value": ["recipe.yaml"] * 9}, 80)
    assert max(map(len, lines)) <= 80


def test_explain_lists_defaults_of_each_kind():
    (rank,) = explain_key("adapter.r")
    defaults = {kind: meaning.default for meaning in rank.meanings for kind in meaning.kinds}
    assert defaults == {
        "lora": "16", "qa_lora": "16", "adalora": "12", "vera": "256", "loha": "8", "lokr": "8",
    }  # fmt: skip
    assert "lora_rank" in rank.spellings


def test_explained_defaults_equal_those_of_a_recipe(good: str, load: Load):
    resolved = dump_recipe(load(good).recipe)
    for key in ("training.pack_length", "data.overlength", "evaluation.batch_size", "optimizer.schedule"):
        (explanation,) = explain_key(key)
        name = key.rpartition(".")[2]
        assert f"{name}: {explanation.meanings[0].default}\n" in resolved


def test_explained_resume_rule_is_of_the_key_or_its_section():
    def told(key: str) -> str:
        return explain_key(key)[0].meanings[0].on_resume

    assert told("training.epochs") == OnResume.EXTENDS.value
    assert told("training.seed") == OnResume.FROZEN.value
    assert told("training.micro_batch_size") == OnResume.MAY_CHANGE.value
    assert told("evaluation.every_steps") == OnResume.MAY_CHANGE.value


def test_explain_accepts_the_end_of_a_path():
    assert [each.key for each in explain_key("r")] == ["adapter.r", "modules.adapter.r"]
    assert [each.key for each in explain_key("data.train.0.path")] == ["data.train.path"]


def test_explained_kind_lists_keys_with_defaults():
    (lora,) = explain_key("lora")
    assert (lora.key, lora.word) == ("adapter.method", "lora")
    assert lora.keys["r"] == "Rank of the update. Default: 16."
    assert "target_r" not in lora.keys
    assert [each.key for each in explain_key("nf4")] == ["quantization.kind", "modules.quantization.kind"]


def test_explained_section_lists_kinds_or_keys():
    (adapter,), (training,) = explain_key("adapter"), explain_key("training")
    assert "qa_lora" in adapter.choices
    assert not adapter.keys
    assert training.keys["seed"].endswith("Default: 42.")


@pytest.mark.parametrize(
    ("name", "key", "kind"),
    [
        ("completion", "data.train.completion", "data.train.format"),
        ("text", "data.validation.text", "evaluation.tasks.data.format"),
        ("tools", "data.train.tools", None),
        ("generate", None, "evaluation.tasks.kind"),
    ],
)
def test_explain_name_of_key_and_kind_explains_each_once(name: str, key: str | None, kind: str | None):
    found = [(each.key, each.word) for each in explain_key(name)]
    assert len(set(found)) == len(found)
    assert ((key, None) in found) == any(word is None for _, word in found) == (key is not None)
    assert ((kind, name) in found) == any(word is not None for _, word in found) == (kind is not None)


def lines_of(*arguments: str) -> list[str]:
    result = CliRunner().invoke(app, ["explain", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def test_explain_key_of_several_sections_prints_the_documentation_once(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("data: {train: [{path: x, tools: f}], validation: [{path: y, tools: f}]}")
    (tmp_path / "b.yaml").write_text("data: {validation: [{path: z, tools: g}]}")
    lines = lines_of("tools", "--recipes", str(tmp_path))
    assert lines[:3] == ["data.train.tools", "data.validation.tools", "evaluation.tasks.data.tools"]
    assert [line.split(maxsplit=2)[2] for line in lines if "only with" in line] == ["format: chat, sharegpt"]
    assert [line.split(maxsplit=2)[2] for line in lines if "in recipes" in line] == ["f: a.yaml; g: b.yaml"]
    objects = [json.loads(line) for line in lines_of("tools", "--recipes", str(tmp_path), "--json")]
    assert [(each["key"], each["recipes"]) for each in objects][:2] == [
        ("data.train.tools", {"f": ["a.yaml"]}),
        ("data.validation.tools", {"f": ["a.yaml"], "g": ["b.yaml"]}),
    ]


def test_explain_keys_of_one_name_with_other_meanings_stay_separate():
    lines = lines_of("chat_template")
    starts = [index for index, line in enumerate(lines) if not line.startswith(" ")]
    assert lines[starts[-1]] == "evaluation.tasks.chat_template"
    only_with = [line.split(maxsplit=2)[2] for line in lines if line.strip().startswith("only with")]
    assert only_with == ["format: completion", "kind: lm_eval"]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("lora_rank", "here it is `adapter.r`"),
        ("optimizer.learning_rat", "did you mean `optimizer.learning_rate`?"),
        ("sead", "did you mean `seed`?"),
        ("qalora", "did you mean `qa_lora`?"),
        ("\x00", "sections: model, quantization"),
    ],
)
def test_explain_unknown_key_suggests_a_known_one(key: str, hint: str):
    with pytest.raises(UsageError) as caught:
        explain_key(key)
    assert str(caught.value.hint).startswith(hint)


def test_values_in_lists_recipes_by_value(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("adapter: {method: lora, r: 8}\ndata: {train: [{path: x}, {path: y}]}")
    (tmp_path / "b.yaml").write_text("adapter: {method: vera, r: 8}")
    (tmp_path / "broken.yaml").write_text("adapter: {")

    def values(key: str) -> dict[str, list[str]]:
        return values_in(explain_key(key)[0], tmp_path)

    assert values("adapter.r") == {"8": ["a.yaml", "b.yaml"]}
    assert values("data.train.path") == {"x": ["a.yaml"], "y": ["a.yaml"]}
    assert values("lora") == {"lora": ["a.yaml"]}
    assert values("training.seed") == {}


def test_explain_command_lists_sections_and_writes_json():
    told = CliRunner().invoke(app, ["explain"])
    assert [line.split()[0] for line in told.stdout.splitlines()[1:] if line[4] != " "] == list(Recipe.model_fields)
    assert set(sections()) == set(Recipe.model_fields)
    answer = CliRunner().invoke(app, ["explain", "training.seed", "--json"]).stdout
    assert json.loads(answer)["meanings"][0]["default"] == "42"
    assert CliRunner().invoke(app, ["explain", "adapter.rank_of_all"]).exit_code == 2

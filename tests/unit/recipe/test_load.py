from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import Problem, RecipeError, UnsupportedError
from finetune.recipe import load as load_module
from finetune.recipe.load import dump_recipe, json_schema, load_recipe
from finetune.recipe.recipe import Recipe
from finetune.recipe.schema import Shape, every_key, shape_at
from finetune.recipe.sections.adapter import Adapter, AdapterSection
from finetune.recipe.yaml.document import MAX_PROBLEMS, KeyPath, dotted, read_yaml
from finetune.recipe.yaml.writer import block

from .conftest import GOOD, Load, Problems


def test_loaded_recipe_has_text_path_and_overrides(good: str, load: Load, tmp_path: Path) -> None:
    loaded = load(good, "training.seed=7")
    assert loaded.recipe.adapter.method == "lora"
    assert loaded.recipe.optimizer.learning_rate == 2e-4
    assert loaded.recipe.training.seed == 7
    assert (loaded.text, loaded.path, loaded.overrides) == (good, tmp_path / "recipe.yaml", ("training.seed=7",))


def test_relative_paths_start_at_the_recipe_folder(good: str, load: Load, tmp_path: Path) -> None:
    recipe = load(good).recipe
    paths = [source.path for source in recipe.data.train]
    assert paths == [str(tmp_path / "tickets.jsonl"), str(tmp_path.parent / "facts.jsonl")]
    assert recipe.model.name == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("file", "name"), [("tickets v2.yaml", "tickets-v2"), ("_x.yml", "x"), ("é.yaml", "run"), ("a" * 99, "a" * 64)]
)
def test_run_name_defaults_to_file_name(good: str, tmp_path: Path, file: str, name: str) -> None:
    path = tmp_path / file
    path.write_text(good.replace("run: {name: tickets-qlora}\n", ""))
    assert load_recipe(path).recipe.run.name == name
    path.write_text(good)
    assert load_recipe(path).recipe.run.name == "tickets-qlora"


# --- files that are no recipes


def test_missing_file_hint_has_the_nearest_name(good: str, tmp_path: Path) -> None:
    (tmp_path / "qlora.yaml").write_text(good)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "qlroa.yaml")
    (problem,) = caught.value.problems
    assert caught.value.exit_code == 2
    assert problem.where == str(tmp_path / "qlroa.yaml")
    assert problem.hint == f"did you mean {tmp_path / 'qlora.yaml'}?"


def test_folder_hint_lists_its_recipes(good: str, tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(good)
    with pytest.raises(RecipeError, match=r"recipes in that folder: b\.yaml"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match="there is no folder"):
        load_recipe(tmp_path / "nowhere" / "b.yaml")


def test_unreadable_file_raises_recipe_error(tmp_path: Path) -> None:
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(loop)


def test_endless_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not a regular file"):
        load_recipe(Path("/dev/zero"))
    sparse = tmp_path / "sparse.yaml"
    sparse.touch()
    os.truncate(sparse, 1 << 40)
    with pytest.raises(RecipeError, match="larger than 1 MiB"):
        load_recipe(sparse)


def test_pipe_of_a_command_line_is_read_and_any_other_is_refused(good: str, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, good.encode())
    os.close(writing)
    try:
        assert load_recipe(Path(f"/dev/fd/{reading}")).recipe.run.name == "tickets-qlora"
    finally:
        os.close(reading)
    os.mkfifo(tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match="not a regular file"):
        load_recipe(tmp_path / "recipe.yaml")


# --- round trip


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_resolved_recipe_is_read_back_with_every_text(text: str) -> None:
    data = yaml.safe_load(GOOD)
    data["data"]["train"][1]["system"] = data["data"]["train"][1]["output"] = text
    data["data"]["template_arguments"] = {"words": text}
    recipe = Recipe.model_validate(data)
    assert Recipe.model_validate(read_yaml(dump_recipe(recipe), "recipe").data) == recipe


@pytest.mark.parametrize("character", ["\x85", "\u2028", "\u2029", "\r", "\r\n", "\x0b", "\x1c", "\ufeff", "\u200b"])
def test_resolved_recipe_keeps_line_separators_of_all_kinds(character: str) -> None:
    data = yaml.safe_load(GOOD)
    for text in (character, f"a{character}b", f"a {character} b{character}"):
        data["data"]["train"][1]["system"] = text
        recipe = Recipe.model_validate(data)
        assert read_yaml(dump_recipe(recipe), "recipe").data["data"]["train"][1]["system"] == text


def test_dump_recipe_refuses_what_it_cannot_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.model_validate(yaml.safe_load(GOOD))
    monkeypatch.setattr(load_module, "block", lambda data: block({**data, "run": {"name": "another"}}))
    with pytest.raises(RecipeError, match="does not read back") as refusal:
        dump_recipe(recipe)
    assert [problem.key for problem in refusal.value.problems] == ["run"]


@pytest.mark.parametrize("path", ["", " ", "\t"])
@pytest.mark.parametrize(
    "key", ["data.train.0.path", "data.validation.0.path", "adapter.continue_from", "model.chat_template"]
)
def test_empty_path_is_refused(good: str, load: Load, key: str, path: str) -> None:
    with pytest.raises(RecipeError, match="found nothing") as refusal:
        load(good, f"{key}={json.dumps(path)}")
    assert [problem.key for problem in refusal.value.problems] == [key]


def test_override_deeper_than_any_recipe_is_refused_at_once(good: str, load: Load) -> None:
    began = time.process_time()
    with pytest.raises(RecipeError, match="more than 32 parts"):
        load(good, f"adapter.{'x.' * 5000}r=1")
    assert time.process_time() - began < 2


# --- problems


@pytest.mark.parametrize(
    ("old", "new", "place", "key", "what", "hint"),
    [
        ("r: 16", "r: 0", "6:6", "adapter.r", "expected a whole number of at least 1, found the number 0", None),
        ("r: 16", "r: x", "6:6", "adapter.r", 'found text "x"', None),
        ("r: 16", "r: true", "6:6", "adapter.r", "found true", None),
        ("r: 16", "r:", "6:5", "adapter.r", "found nothing (null)", "leave the key out"),
        ("r: 16", "rr: 16", "6:3", "adapter.rr", "unknown key for method: lora", "did you mean `r`?"),
        ("r: 16", "R: 16", "6:3", "adapter.R", "unknown key", "did you mean `r`?"),
        ("r: 16", "seed: 16", "6:3", "adapter.seed", "unknown key", "it belongs to `training.seed`"),
        ("r: 16", "zzz: 16", "6:3", "adapter.zzz", "unknown key", "valid keys: method, continue_from, r, alpha"),
        ("run:", "learning_rate: 1\nrun:", "22:1", "learning_rate", "unknown key", "`optimizer.learning_rate`"),
        ("method: lora", "", "4:1", "adapter.method", "missing; one of lora, qa_lora", None),
        ("method: lora", "metod: lora", "5:3", "adapter.metod", "unknown key", "did you mean `method`?"),
        (
            "method: lora",
            "method: lorra",
            "5:11",
            "adapter.method",
            "one of lora, qa_lora",
            "did you mean `lora`?",
        ),
        ("method: lora", "method: [1]", "5:11", "adapter.method", "found a list [1]", None),
        ("method: lora", "method: full", "6:3", "adapter.r", "for method: full", "it belongs to method: lora"),
        ("[q_proj, v_proj]", "q_proj", "8:19", "adapter.target_modules", "`all-linear` or a list", "write [q_proj]"),
        ("[q_proj, v_proj]", "[1]", "8:19", "adapter.target_modules", "found a list [1]", None),
        ("kind: nf4, ", "", "3:1", "quantization.kind", "missing; one of none, nf4, fp4, int8", None),
        ("{kind: nf4, double_quant: true}", "", "3:14", "quantization", "found nothing", "quantization: {kind: none}"),
        ("{kind: nf4, double_quant: true}", "nf4", "3:15", "quantization", 'text "nf4"', "quantization: {kind: nf4}"),
        ("kind: nf4, double", "kind:nf4, double", "3:16", "quantization.kind:nf4", "unknown", "space after the colon"),
        ("double_quant: true", "double_quant: 2", "3:41", "quantization.double_quant", "true or false", None),
        ("format: chat\n", "formt: chat\n", "12:7", "data.train.0.formt", "unknown key", "did you mean `format`?"),
        ("path: tickets.jsonl\n      ", "", "11:7", "data.train.0", "the source has no path", "hub: {name: org/name}"),
        ("[0.9, 0.95]", "[0.9]", "16:65", "optimizer.betas", "a list of 2 items", None),
        ("[0.9, 0.95]", "[0.9, 1]", "16:71", "optimizer.betas.1", "below 1, found the number 1", None),
        ("[0.9, 0.95]", "[0.9, false]", "16:71", "optimizer.betas.1", "found false", None),
        ("precision: auto", "precision: flaot32", "20:14", "training.precision", "one of auto", "`float32`?"),
        ("epochs: 1.5", "epochs: 1" + 400 * "0", "18:11", "training.epochs", "a number of 401 characters", None),
        (
            "{every_steps: 50}",
            "[50]",
            "21:13",
            "evaluation",
            "found a list [50]",
            "write evaluation: {metrics: ...}",
        ),
        ("name: tickets-qlora", "name: 2024", "22:13", "run.name", "found the number 2024", "in quotes"),
        ("name: tickets-qlora", "name: ../x", "22:13", "run.name", "text that matches", None),
    ],
)
def test_problem_has_place_key_and_hint(
    good: str, problems: Problems, tmp_path: Path, old: str, new: str, place: str, key: str, what: str, hint: str | None
) -> None:
    assert good.count(old) >= 1
    problem = problems(good.replace(old, new, 1))[0]
    assert problem.where == f"{tmp_path / 'recipe.yaml'}:{place}"
    assert problem.key == key
    assert what in problem.what
    assert (hint or "") in (problem.hint or "")


def test_problems_are_complete_unique_and_in_line_order(good: str, problems: Problems) -> None:
    bad = good.replace("r: 16", "r: 0").replace("epochs", "epoch").replace("{every_steps: 50}", "{every_steps: 0}")
    bad = "lora_r: 8\n" + bad.replace("[q_proj, v_proj]", "[1, 2]")
    found = problems(bad, "run.name=../x", "model.dtype=int4")
    assert [problem.key for problem in found] == [
        "lora_r",
        "adapter.r",
        "adapter.target_modules",
        "training.epoch",
        "evaluation.every_steps",
        "run.name",
        "model.dtype",
    ]


def test_problems_are_limited(good: str, problems: Problems) -> None:
    assert len(problems(good + "".join(f"key{number}: 1\n" for number in range(5000)))) == MAX_PROBLEMS


@pytest.mark.parametrize("name", ["~no-such-user/model", "x" * 5000])
def test_model_name_that_cannot_be_a_path_stays(good: str, load: Load, name: str) -> None:
    assert load(good, f"model.name={name}").recipe.model.name.endswith(name)


def test_empty_recipe_lacks_every_required_section(problems: Problems) -> None:
    assert [problem.key for problem in problems("")] == ["model", "adapter", "data"]
    assert all(problem.where.endswith(":1:1") for problem in problems(""))


@pytest.mark.parametrize("text", ["- a\n- b\n", "adapter:lora\n", "7\n"])
def test_recipe_that_is_not_a_mapping_is_refused(problems: Problems, text: str) -> None:
    (problem,) = problems(text, "adapter.r=8")
    assert problem.what.startswith("expected a mapping with `model`")


def test_found_value_is_shortened(good: str, problems: Problems) -> None:
    (problem,) = problems(good.replace("epochs: 1.5", f"epochs: {'x' * 5000}"))
    assert len(problem.what) < 120


def test_messages_have_no_library_terms(good: str, problems: Problems) -> None:
    bad = (
        good.replace("[q_proj, v_proj]", "{a: 1}").replace("format: chat", "format: chats").replace("[0.9, 0.95]", "x")
    )
    text = str(RecipeError(problems(bad)))
    assert text.count("\n") >= 3
    assert not any(
        word in text for word in ("pydantic", "Input should", "literal[", "list[", "union", "validation error")
    )


# --- overrides


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optimizer.learning_rate=1e-5", "optimizer", "learning_rate", 1e-5),
        ("adapter.target_modules=[a, b]", "adapter", "target_modules", ["a", "b"]),
        ("adapter.target_modules=all-linear", "adapter", "target_modules", "all-linear"),
        ("quantization={kind: int8}", "quantization", "kind", "int8"),
        ("evaluation.every_steps=null", "evaluation", "every_steps", None),
        ("evaluation.every_steps=", "evaluation", "every_steps", None),
        ('run.name="2024"', "run", "name", "2024"),
        ("model.name=a=b", "model", "name", "a=b"),
    ],
)
def test_override_value_is_yaml(good: str, load: Load, override: str, section: str, key: str, value: Any) -> None:
    assert getattr(getattr(load(good, override).recipe, section), key) == value


def test_last_override_wins(good: str, load: Load) -> None:
    assert load(good, "adapter.r=1", "adapter={method: lora, r: 2}", "adapter.r=3").recipe.adapter.r == 3
    assert load(good, "adapter.r=1", "adapter={method: lora}").recipe.adapter.r == 16


def test_override_changes_or_appends_list_items(good: str, load: Load, tmp_path: Path) -> None:
    train = load(good, "data.train.1.path=x.jsonl", "data.train.2={path: y, format: text}").recipe.data.train
    assert [Path(source.path).name for source in train] == ["tickets.jsonl", "x.jsonl", "y"]


def test_override_creates_absent_or_null_sections(load: Load) -> None:
    text = "model: {name: a/b}\ntraining:\n"
    overrides = ("training.seed=3", "adapter.method=lora", "data.train.0.path=x", "data.train.0.format=text")
    recipe = load(text, *overrides, "optimizer.learning_rate=1").recipe
    assert recipe.training.seed == 3
    assert recipe.data.train[0].format == "text"
    assert (recipe.optimizer.name, recipe.optimizer.learning_rate) == ("adamw", 1)


@pytest.mark.parametrize(
    ("override", "where", "what", "hint"),
    [
        ("adapter.r=0", "adapter.r", "found the number 0", ""),
        ("adapter.rr=1", "adapter.rr", "unknown key", "did you mean `r`?"),
        ("lora_r=1", "lora_r", "unknown key", "here it is `adapter.r`"),
        ("foo.bar.baz=1", "foo.bar.baz", "unknown key", "valid keys"),
        ("adapter.r", "adapter.r", "expected key=value", "--set"),
        ("=1", "", "expected a dotted key", ""),
        ("a..b=1", "a..b", "expected a dotted key", ""),
        ("model.name=@x", "model.name", "cannot begin with '@'", """--set 'model.name="@x"'"""),
        ("model.name=#x", "model.name", "is a comment", """--set 'model.name="#x"'"""),
        ("model.name=a: b: c", "model.name", "no key is allowed", """--set 'model.name="a: b: c"'"""),
        ("adapter.r=010", "adapter.r", "octal", ""),
        ("adapter.r={a: 1, a: 2}", "adapter.r", "a second `a`", "keep one"),
        ("adapter.r=\udcff", "adapter.r", "U+DCFF", ""),
        ("model.name.x=1", "model.name.x", "model.name is a single value", ""),
        ("data.train.9.path=x", "data.train.9.path", "a list of 2 and has no item '9'", "2 adds an item"),
        ("data.train.x=1", "data.train.x", "a list of 2 and has no item 'x'", ""),
        ("adapter={method:lora}", "adapter", "unknown key", "space after the colon"),
    ],
)
def test_override_problem_has_its_argument(
    good: str, problems: Problems, override: str, where: str, what: str, hint: str
) -> None:
    problem = problems(good, override)[0]
    assert problem.where == f"--set {where}"
    assert what in problem.what
    assert hint in (problem.hint or "")


def test_problem_in_overridden_section_has_its_argument(good: str, problems: Problems) -> None:
    (problem,) = problems(good, "adapter={method: lora, r: 0}")
    assert (problem.where, problem.key) == ("--set adapter", "adapter.r")


def test_overridden_kind_hint_replaces_the_section(good: str, problems: Problems) -> None:
    found = problems(good, "adapter.method=full")
    assert [problem.key for problem in found] == ["adapter.r", "adapter.alpha", "adapter.target_modules"]
    assert all("--set 'adapter={method: full}'" in str(problem.hint) for problem in found)


def _sample(shape: Shape) -> Any:
    """A value that fits the key and is not its default."""
    if shape.choices:
        return shape.choices[-1]
    words = shape.expected()
    samples = {
        "a whole number": 9,
        "a number below 0": -0.5,
        "a number": 0.5,
        "a list of 2": [0.5, 0.25],
        "a list of items, each text": ["other"],
        "a list of items, each one of": ["bleu"],
        "a list that is not empty of items, each text": ["other"],
        "a list that is not empty of items, each true or false": ["other"],
        "true or false": True,
        "a mapping": {"key": 1},
        "text that matches ^[\\w.-]+/": "org/other",
        "text": "other",
    }
    return next(value for start, value in samples.items() if words.startswith(start))


def _settings() -> Iterator[tuple[KeyPath, list[str], Any]]:
    """For each key of each kind of section: its path, overrides that bring the kind about, a value."""
    for path, shape in every_key().items():
        if shape.is_mapping or (shape.item and shape.item.is_mapping):
            continue
        parent = shape_at(path[:-1], None)
        assert parent is not None
        for kind, section in parent.arms.items() or [("", parent)]:
            child = section.child(path[-1])
            if child:
                more = ", path: x" if path[0] == "data" else ""
                yield path, [f"{dotted(path[:-1])}={{{parent.tag}: {kind}{more}}}"] if kind else [], _sample(child)


@pytest.mark.parametrize(("path", "before", "value"), _settings(), ids=lambda part: str(part)[:60])
def test_override_sets_every_key(good: str, load: Load, path: KeyPath, before: list[str], value: Any) -> None:
    if path == ("data", "validation_fraction"):
        before = ["data.validation=[]"]
    if path == ("training", "pack_length"):
        before = ["training.batching=packed", "data.max_length=8"]
    if path == ("model", "chat_template"):
        value = "chatml"
    if path[-1] == "template":
        value = "alpaca"
    if path[-1] == "system":
        value = "You answer briefly."
        before = [each.replace("completion", "completion, chat_template: true") for each in before]
    if path[-1] == "template_without_input":
        before = [each.replace("}", ", template: '{instruction} as {input}'}") for each in before]
        value = "{instruction}"
    if path[:2] == ("model", "new_tokens") and len(path) > 2:
        before = ["model.new_tokens=[{token: <b>}]"]
    if path == ("quantization", "options") or value == "plugin":
        before = ["quantization={kind: plugin, name: other}"]
    if "hub" in path:
        before = [f"{dotted(path[:3])}={{format: chat, hub: {{name: org/name}}}}"]
    if value == "stochastic":
        before = ["adapter={method: full}", "quantization={kind: none}", "model.dtype=bfloat16", *before]
    if value == "loftq":
        before = ["quantization={kind: affine}", *before]
    if path[1:] == ("train", 0, "weight"):
        before = ["data.train.1.weight=1", *before]
    if path[:2] == ("adapter", "start"):
        begun = (
            before[0]
            .partition("=")[2]
            .rstrip("}")
            .replace("labels", "labels, labels: [a]")
            .replace("text", "text, text: a")
        )
        before = [f"adapter={{method: prompt_tuning, start: {begun}}}}}"]
    if value == "trainable_tokens" or "trainable_tokens" in "".join(before):
        before = ["adapter={method: trainable_tokens, tokens: [a]}"]
    if path[-1] == "feedforward_modules":  # they are among the targets
        before = ["quantization={kind: none}", "adapter={method: ia3, target_modules: [other]}"]
    if path[0] == "sweep":  # a key has all that its kind of draw needs
        kind = before[0].partition("draw: ")[2].rstrip("}") if before else "uniform"
        drawn = {"choice": "choices: [1]", "integer": "low: 1, high: 16"}.get(kind, "low: 0.01, high: 16")
        before = [f"sweep={{keys: [{{key: adapter.r, draw: {kind}, {drawn}}}]}}"]
        value = "adapter.alpha" if path[-1] == "key" else value
    if path[0] == "modules":  # a rule must say something, and what it says of a layer that is skipped is that
        adapter = "" if path[2] == "quantization" else ", adapter: {}" if path[-1] == "skip" else ", adapter: {r: 4}"
        kind = before[0].partition("=")[2] if before else "{kind: none}"
        kind = "{kind: plugin, name: x}" if value == "plugin" or "plugin" in kind else kind
        before = [f"modules=[{{match: '*', quantization: {kind}{adapter}}}]"]
    if path[:2] == ("evaluation", "tasks") and path[-1] == "weight":
        pytest.skip("a rule refuses it")
    if path[:2] == ("evaluation", "tasks"):
        before = [f"evaluation.tasks={json.dumps([_task(path, before, value)])}"]
    if path[-1] in ("modules_to_save", "trainable_tokens") and "qa_lora" in "".join(before):
        pytest.skip("a rule refuses it")
    if value == "qa_lora" or "qa_lora" in "".join(before):
        before = ["quantization={kind: affine}", *before]
    if any(f"method: {name}}}" in f"{before} method: {value}}}" for name in ("full", "ia3", "loha", "lokr")):
        before = ["quantization={kind: none}", *before]
    reached: Any = load(good, *before, f"{dotted(path)}={json.dumps(value)}").recipe
    for segment in path:
        reached = reached[segment] if isinstance(segment, int) else getattr(reached, segment)
    if path[-1] in ("path", "continue_from"):
        assert reached.endswith("/other")
    else:
        assert json.loads(json.dumps(reached)) == value


def _task(path: KeyPath, before: list[str], value: Any) -> dict[str, Any]:
    """A task that has the key at `path`."""
    told = before[0].partition("=")[2].strip("{}").split(", ")[0].split(": ") if before else ["", ""]
    kind = value if path[-1] == "kind" else told[1] if told[0] == "kind" else "generate"
    data: dict[str, Any] = {"hub": {"name": "org/name"}} if "hub" in path else {"path": "x"}
    if told[0] == "format" and "hub" not in path:
        data["format"] = told[1]
    if path[-1] == "template_without_input":
        data["template"] = "{instruction} as {input}"
    if path[-1] == "system" and data.get("format") == "completion":
        data["chat_template"] = True
    return {"name": "a", "kind": kind} | ({} if kind == "lm_eval" else {"data": data})


# --- secrets


@pytest.mark.parametrize(
    "secret",
    ["hf_" + "aB3" * 8, "sk-" + "x1-_" * 6, "https://me:pass@host/x", "s3://key@bucket/x"],
)
@pytest.mark.parametrize("line", ["run: {{name: {}}}", "{}: 1", "# {}", "model: [{}", "a: '{}"])
def test_secret_is_refused_and_not_shown(good: str, problems: Problems, secret: str, line: str) -> None:
    (problem,) = problems(good + line.format(secret))
    assert ":23:" in problem.where
    assert "token" in problem.what
    assert secret not in repr(problem)
    assert secret[:12] not in repr(problem)


def test_secret_in_override_is_refused_and_not_shown(good: str, problems: Problems) -> None:
    secret = "hf_" + "aB3" * 8
    first, second = problems(good, f"run.name={secret}", f"{secret}=1")
    assert first.where == "--set run.name"
    assert secret not in repr((first, second))


@pytest.mark.parametrize("text", ["hf_hub", "task-sk-x", "package://llm/a.gguf", "data/x@2.jsonl", "https://host/a@b"])
def test_ordinary_text_is_not_a_secret(good: str, load: Load, text: str) -> None:
    assert load(good, f"data.train.0.messages={text}").recipe.data.train[0].messages == text


# --- back to YAML


def test_dumped_recipe_loads_as_equal_recipe(good: str, load: Load) -> None:
    recipe = load(good).recipe
    text = dump_recipe(recipe)
    again = load(text)
    assert again.recipe == recipe
    assert dump_recipe(again.recipe) == text


def test_dump_has_defaults_in_schema_order(good: str, load: Load) -> None:
    text = dump_recipe(load(good).recipe)
    tops = [line.partition(":")[0] for line in text.splitlines() if not line.startswith((" ", "-"))]
    assert tops == list(json_schema()["properties"])
    assert "  warmup_ratio: 0.03\n" in text
    assert "{" not in text.replace("template_arguments: {}", "")


@pytest.mark.parametrize("rate", [2e-05, 1e-8, 1e-300, 123456789.123, 1e22])
def test_dumped_numbers_round_trip(good: str, load: Load, rate: float) -> None:
    recipe = load(good, f"optimizer.learning_rate={rate!r}").recipe
    assert recipe.optimizer.learning_rate == rate
    assert load(dump_recipe(recipe)).recipe.optimizer.learning_rate == rate


@pytest.mark.parametrize(
    "text",
    [
        *("1e-5", "0o17", "010", ".inf", "no", "null", "~", "", "- x", "*x", "!x", "# x", "a: b", "'\"", "\\"),
        *(" x ", "\t", "two\nlines\n", "\n lines\n\n", "x" * 300, "a " * 200, "é\u2028ü", "\x07", "\ufeff", "🙂"),
    ],
)
def test_dumped_text_round_trips(good: str, load: Load, text: str) -> None:
    escaped = json.dumps(text, ensure_ascii=text != "🙂")
    recipe = load(good, f"data.train.1.system={escaped}").recipe
    assert recipe.data.train[1].system == text
    assert load(dump_recipe(recipe)).recipe == recipe


# --- the schema for editors, and what loading costs


def test_json_schema_is_closed_and_describes_every_key() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["additionalProperties"] is False
    tags = {"kind", "method", "format", "name", "draw"}
    keys = {dotted(path): shape for path, shape in every_key().items() if len(path) > 1 and path[-1] not in tags}
    assert len(keys) > 30
    assert [key for key, shape in keys.items() if not shape.description] == []


def test_json_schema_returns_a_copy() -> None:
    json_schema()["properties"].clear()
    assert json_schema()["properties"]


def test_load_recipe_imports_no_heavy_library(good: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(good)
    code = (
        "import pathlib, sys; from finetune.recipe.load import load_recipe;"
        "load_recipe(pathlib.Path(sys.argv[1])); print(*sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, env=environment, check=True
    )
    modules = set(done.stdout.split())
    assert "yaml" in modules
    assert not modules & {"torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "numpy"}


LOCATED = """\
model: {name: org/name}
adapter:
  method: lora
  target_modules:
    - q_proj
    - k_proj
modules:
  - {match: '*.q_proj', adapter: {r: 2}}
data: {train: [{path: rows.jsonl, format: chat}]}
"""


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("adapter.target_modules.1", ":6:7"),
        ("adapter.target_modules", ":5:5"),
        ("modules.0.match", ":8:13"),
        ("adapter.r", ":2:1"),  # not written: its section
        ("training.batching", ":1:1"),  # its section is not written either
    ],
)
def test_error_about_a_key_gets_its_place(load: Load, key: str, place: str):
    loaded = load(LOCATED)
    with pytest.raises(RecipeError) as several, loaded.locating_errors():
        raise RecipeError([Problem(key, key, "wrong", "right")])
    assert several.value.problems[0].where == f"{loaded.path}{place}"
    with pytest.raises(UnsupportedError) as one, loaded.locating_errors():
        raise UnsupportedError("wrong", where=key)
    assert one.value.where == f"{loaded.path}{place}: {key}"


@pytest.mark.parametrize("where", [None, "rows.jsonl:3", "model.name (llama)", "adapter.nothing", "--dtype", ""])
def test_error_about_something_else_keeps_its_place(load: Load, where: str | None):
    with pytest.raises(UnsupportedError) as caught, load(LOCATED).locating_errors():
        raise UnsupportedError("wrong", where=where)
    assert caught.value.where == where


def test_located_problem_is_not_located_again(load: Load):
    problem = Problem("other.yaml:1:1", "adapter.r", "wrong")
    with pytest.raises(RecipeError) as caught, load(LOCATED).locating_errors():
        raise RecipeError([problem])
    assert caught.value.problems == (problem,)


@pytest.mark.parametrize(("rank", "target"), [(2, 1), (4, 2), (8, 5), (9, 8), (12, 8), (64, 8)])
def test_adalora_with_a_rank_alone_has_a_target_rank_below_it(good: str, load: Load, rank: int, target: int):
    recipe = load(good, f"adapter={{method: adalora, r: {rank}}}", "training.max_steps=100").recipe
    assert recipe.adapter.target_r == target


@pytest.mark.parametrize("section", get_args(get_args(Adapter)[0]), ids=lambda kind: kind.__name__)
def test_method_with_only_its_name_is_valid(good: str, load: Load, section: type[AdapterSection]):
    (method,) = get_args(section.model_fields["method"].annotation)
    new = "model.new_tokens=['<x>']" if method == "trainable_tokens" else "training.seed=1"
    overrides = f"adapter={{method: {method}}}", "quantization={}", "training.max_steps=100", new
    recipe = load(good, *overrides).recipe
    assert (recipe.adapter.method, recipe.quantization.kind) == (method, "none")

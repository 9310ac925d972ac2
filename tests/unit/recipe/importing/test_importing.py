"""Configurations of other tools become valid recipes, and nothing of them is lost without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cli.main import app
from finetune.errors import FinetuneError, RecipeError, UnsupportedError, UsageError
from finetune.recipe.importing.convert import PLACEHOLDER, TOOLS, Imported, imported
from finetune.recipe.importing.translation import Switch, To
from finetune.recipe.load import recipe_of
from finetune.recipe.recipe import Recipe
from finetune.recipe.schema import every_key

FIXTURES = Path(__file__).parents[3] / "fixtures" / "other_tools"
OUR_KEYS = {".".join(segment for segment in path if isinstance(segment, str)) for path in every_key()}
LEAST: dict[str, dict[str, Any]] = {
    "axolotl": {"base_model": "org/base", "datasets": [{"path": "rows.jsonl"}]},
    "llamafactory": {"model_name_or_path": "org/base", "stage": "sft", "dataset": "rows.jsonl"},
    "trl": {"model_name_or_path": "org/base", "dataset_name": "rows.jsonl"},
    "torchtune": {
        "model": {"_component_": "torchtune.models.llama3.llama3_8b"},
        "checkpointer": {"checkpoint_dir": "/tmp/base"},
        "dataset": {"_component_": "torchtune.datasets.alpaca_dataset"},
        "optimizer": {"_component_": "torch.optim.AdamW"},
    },
}


def translated(tool: str, config: dict[str, Any], folder: Path) -> tuple[Imported, Recipe]:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    made = imported(tool, file, folder / "recipe.yaml")
    return made, recipe_of(made.text, folder / "recipe.yaml").recipe


def fixture(tool: str, folder: Path) -> tuple[Imported, Recipe]:
    made = imported(tool, FIXTURES / f"{tool}.yaml", folder / "recipe.yaml")
    return made, recipe_of(made.text, folder / "recipe.yaml").recipe


def value(recipe: Recipe, key: str) -> Any:
    found: Any = recipe.model_dump(mode="json")
    for segment in key.split("."):
        found = found[int(segment)] if segment.isdigit() else found[segment]
    return found


def test_axolotl_file_becomes_equivalent_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    made, recipe = fixture("axolotl", tmp_path)
    expected = {
        "model.name": "example-org/base-8b", "model.attention": "auto",
        "quantization.kind": "nf4", "quantization.double_quant": True,
        "adapter.method": "lora", "adapter.r": 24, "adapter.alpha": 48, "adapter.dropout": 0.05,
        "adapter.target_modules": "all-linear", "adapter.modules_to_save": ["embed_tokens"],
        "data.train.0.path": str(tmp_path / "data/tickets.jsonl"), "data.train.0.format": "sharegpt",
        "data.train.0.conversations": "turns", "data.train.0.role_key": "speaker", "data.train.0.content_key": "words",
        "data.train.1.hub.name": "example-org/helpdesk", "data.train.1.hub.subset": "english",
        "data.train.1.hub.split": "train[:2000]", "data.train.1.format": "instruction", "data.train.2.format": "auto",
        "data.validation_fraction": 0.1, "data.max_length": 3072, "data.train_on": "assistant",
        "training.batching": "packed", "training.gradient_accumulation_steps": 8, "training.micro_batch_size": 2,
        "training.epochs": 2, "training.gradient_checkpointing": True, "training.seed": 7,
        "training.precision": "auto",
        "optimizer.name": "adamw_8bit", "optimizer.schedule": "cosine", "optimizer.learning_rate": 0.00015,
        "optimizer.warmup_ratio": 0.05, "optimizer.weight_decay": 0.01, "optimizer.betas": [0.9, 0.95],
        "evaluation.every_steps": 40, "run.name": "tickets", "run.directory": "./outputs",
        "trackers.0.name": "wandb", "trackers.0.project": "tickets",
    }  # fmt: skip
    assert {key: value(recipe, key) for key in expected} == expected
    assert [each.key for each in made.left] == [
        "model_type", "datasets.0.roles_to_train", "datasets.2.type", "pad_to_sequence_len",
        "saves_per_epoch", "logging_steps", "wandb_entity", "special_tokens", "loss_spike_guard",
    ]  # fmt: skip
    assert made.left[-1].reason == "ft has no such key"
    lines = (FIXTURES / "axolotl.yaml").read_text(encoding="utf-8").splitlines()
    for each in made.left:
        assert each.line
        assert each.key.rpartition(".")[2] in lines[each.line - 1]


def test_axolotl_column_names_are_carried_over(tmp_path: Path):
    names = {"field_instruction": "ask", "field_input": "about", "field_output": "say", "field_system": "rules"}
    rows = {"path": "rows.jsonl", "type": {**names, "system_prompt": "", "format": "[INST] {instruction} [/INST]"}}
    made, recipe = translated("axolotl", {**LEAST["axolotl"], "datasets": [rows]}, tmp_path)
    assert recipe.data.train[0].model_dump(exclude_defaults=True, exclude={"path"}) == {
        "format": "instruction", "instruction": "ask", "input": "about", "output": "say", "system_column": "rules",
    }  # fmt: skip
    assert [each.key for each in made.left] == ["datasets.0.type.format"]


@pytest.mark.parametrize("names", [{}, {"message_field_role": "who", "message_field_content": "what"}])
def test_axolotl_system_column_of_turns_is_carried_over(names: dict[str, str], tmp_path: Path):
    rows = {"path": "rows.jsonl", "type": "chat_template", "field_system": "rules", **names}
    made, recipe = translated("axolotl", {**LEAST["axolotl"], "datasets": [rows]}, tmp_path)
    assert recipe.data.train[0].system_column == "rules"  # type: ignore[union-attr]
    assert not made.left


def test_llamafactory_file_becomes_equivalent_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    made, recipe = fixture("llamafactory", tmp_path)
    expected = {
        "model.name": "example-org/base-8b-instruct", "quantization.kind": "nf4", "quantization.double_quant": True,
        "adapter.method": "lora", "adapter.r": 12, "adapter.alpha": 24, "adapter.loraplus_ratio": 16,
        "adapter.target_modules": ["q_proj", "v_proj"],
        "data.train.0.path": str(tmp_path / "corpora/tickets_en.json"), "data.train.0.max_rows": 500,
        "data.train.1.path": str(tmp_path / "corpora/tickets_de.json"),
        "data.max_length": 1536, "data.validation_fraction": 0.05,
        "training.micro_batch_size": 2, "training.gradient_accumulation_steps": 4, "training.epochs": 2,
        "training.precision": "bfloat16", "training.checkpoint_every_steps": 200,
        "optimizer.learning_rate": 8e-5, "optimizer.schedule": "cosine", "optimizer.warmup_ratio": 0.08,
        "optimizer.warmup_steps": None,
        "evaluation.every_steps": 100, "evaluation.batch_size": 3,
        "run.name": "tickets", "run.directory": "saves/base-8b/lora",
    }  # fmt: skip
    assert {key: value(recipe, key) for key in expected} == expected
    assert [each.key for each in made.left] == [
        "dataset_info.json", "dataset_info.json", "template", "preprocessing_num_workers", "logging_steps", "plot_loss",
    ]  # fmt: skip


def test_llamafactory_registry_resolves_data_set_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    columns = {"prompt": "ask", "response": "say", "system": "rules"}
    register = {
        "mine": {"file_name": "mine.json", "columns": columns, "folder": "x"},
        "turns": {
            "hf_hub_url": "org/turns",
            "subset": "en",
            "formatting": "sharegpt",
            "columns": {"messages": "dialogue", "system": "rules"},
            "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "guest", "assistant_tag": "house"},
        },
        "ranked": {"file_name": "ranked.json", "ranking": True},
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(register))
    made, recipe = translated("llamafactory", {**LEAST["llamafactory"], "dataset": "mine, turns"}, tmp_path)
    mine, turns = (source.model_dump(exclude_defaults=True) for source in recipe.data.train)
    assert mine == {
        "path": str(tmp_path / "data/mine.json"), "format": "instruction", "instruction": "ask", "output": "say",
        "system_column": "rules",
    }  # fmt: skip
    assert turns == {
        "hub": {"name": "org/turns", "subset": "en"}, "format": "sharegpt", "conversations": "dialogue",
        "role_key": "who", "content_key": "what", "user_roles": ["guest"], "assistant_roles": ["house"],
        "system_column": "rules",
    }  # fmt: skip
    assert [each.key for each in made.left] == ["dataset_info.json: mine.folder"]
    made, _ = translated("llamafactory", {**LEAST["llamafactory"], "dataset": "ranked"}, tmp_path)
    assert {each.key: each.reason for each in made.left}["dataset"] == "ranked has ranked answers"
    (tmp_path / "data" / "dataset_info.json").write_text("{")
    made, _ = translated("llamafactory", {**LEAST["llamafactory"], "dataset": "mine"}, tmp_path)
    assert "cannot be read" in {each.key: each.reason for each in made.left}["dataset"]


def test_trl_file_becomes_equivalent_recipe(tmp_path: Path):
    made, recipe = fixture("trl", tmp_path)
    expected = {
        "model.name": "example-org/base-3b", "model.dtype": "bfloat16", "model.attention": "sdpa",
        "quantization.kind": "nf4", "quantization.double_quant": True,
        "adapter.method": "lora", "adapter.r": 20, "adapter.alpha": 40, "adapter.dropout": 0.1,
        "data.train.0.hub.name": "example-org/tickets", "data.train.0.hub.subset": "english",
        "data.train.0.hub.split": "train", "data.validation.0.hub.split": "test",
        "data.max_length": 1280, "data.train_on": "completion",
        "training.batching": "packed", "training.neftune_alpha": 5, "training.epochs": 1,
        "training.micro_batch_size": 3, "training.gradient_accumulation_steps": 5,
        "optimizer.learning_rate": 1e-4, "optimizer.schedule": "constant", "optimizer.warmup_steps": 12,
        "evaluation.every_steps": 25, "run.name": "tickets", "run.directory": "runs-of-trl",
    }  # fmt: skip
    assert {key: value(recipe, key) for key in expected} == expected
    assert [tracker.name for tracker in recipe.trackers] == ["wandb"]
    assert [each.key for each in made.left] == ["logging_steps", "report_to", "push_to_hub"]


def test_torchtune_file_becomes_equivalent_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    made, recipe = fixture("torchtune", tmp_path)
    expected = {
        "model.kernels": "compiled", "model.name": "/tmp/base-8b", "model.dtype": "bfloat16",
        "quantization.kind": "nf4", "quantization.double_quant": True,
        "adapter.method": "lora", "adapter.r": 10, "adapter.alpha": 20,
        "adapter.target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "data.train.0.path": str(tmp_path / "data/tickets.json"), "data.train.0.format": "sharegpt",
        "data.train.0.conversations": "dialogue", "data.max_length": 2304, "data.train_on": "assistant",
        "training.batching": "packed", "training.seed": 11, "training.micro_batch_size": 2,
        "training.gradient_accumulation_steps": 6, "training.max_steps": 600, "training.max_grad_norm": None,
        "training.precision": "bfloat16",
        "optimizer.name": "adamw", "optimizer.learning_rate": 3e-4, "optimizer.weight_decay": 0.01,
        "optimizer.schedule": "cosine", "optimizer.warmup_steps": 60,
        "run.name": "tickets", "run.directory": "/tmp/tune",
    }  # fmt: skip
    assert {key: value(recipe, key) for key in expected} == expected
    assert {"profiler", "checkpointer.checkpoint_files", "optimizer.fused", "model_folder"} <= {
        each.key for each in made.left
    }


@pytest.mark.parametrize("tool", TOOLS)
def test_import_rules_lead_to_schema_keys(tool: str):
    targets = [rule.key for rule in TOOLS[tool].rules.values() if isinstance(rule, To)]
    switched = [rule for rule in TOOLS[tool].rules.values() if isinstance(rule, Switch)]
    targets += [key for rule in switched for key in (*rule.on, *rule.off)]
    assert targets
    assert set(targets) <= OUR_KEYS
    assert set(TOOLS[tool].defaults) <= {key.partition(".")[0] for key in TOOLS[tool].rules}


@pytest.mark.parametrize("tool", TOOLS)
def test_minimal_configuration_becomes_valid_recipe(tool: str, tmp_path: Path):
    made, recipe = translated(tool, LEAST[tool], tmp_path)
    assert recipe.data.train
    assert made.tool in made.text.splitlines()[0]


@pytest.mark.parametrize("tool", TOOLS)
def test_unknown_key_of_configuration_is_listed_with_line(tool: str, tmp_path: Path):
    made, _ = translated(tool, {**LEAST[tool], "zz_of_the_future": 3}, tmp_path)
    left = {each.key: each for each in made.left}
    assert left["zz_of_the_future"].reason == "ft has no such key"
    assert left["zz_of_the_future"].line
    assert "#   zz_of_the_future: ft has no such key" in made.text


def test_refused_value_is_listed_with_reason(tmp_path: Path):
    config = {**LEAST["axolotl"], "adapter": "lora", "lora_r": -3, "lr_scheduler": "rex", "optimizer": "muon"}
    made, recipe = translated("axolotl", config, tmp_path)
    left = {each.key: each.reason for each in made.left}
    assert left["lora_r"].startswith("adapter.r: expected a whole number of at least 1")
    assert left["lr_scheduler"].startswith("optimizer.schedule: expected one of constant, linear, cosine")
    assert "muon" in left["optimizer"]
    assert (recipe.adapter.method, recipe.optimizer.name) == ("lora", "adamw")


def test_full_fine_tuning_carries_no_adapter_keys(tmp_path: Path):
    made, recipe = translated("axolotl", {**LEAST["axolotl"], "lora_r": 8, "load_in_8bit": True}, tmp_path)
    assert (recipe.adapter.method, recipe.quantization.kind) == ("full", "none")
    assert {each.key for each in made.left} == {"lora_r", "load_in_8bit"}


@pytest.mark.parametrize(
    ("tool", "said", "key", "ours"),
    [
        ("trl", {}, "adapter.method", "full"),
        ("trl", {}, "optimizer.learning_rate", 2e-5),
        ("trl", {}, "optimizer.schedule", "linear"),
        ("trl", {}, "optimizer.warmup_ratio", 0),
        ("trl", {"warmup_ratio": 0.1}, "optimizer.warmup_ratio", 0.1),
        ("llamafactory", {}, "training.epochs", 3),
        ("llamafactory", {}, "adapter.alpha", 16),
        ("axolotl", {}, "data.max_length", 512),
        ("axolotl", {"val_set_size": 0.1, "eval_steps": 5, "early_stopping_patience": 3}, "evaluation.patience", 3),
        ("torchtune", {}, "optimizer.schedule", "constant"),
        ("torchtune", {}, "data.train_on", "all"),
    ],
)
def test_absent_keys_get_the_defaults_of_the_tool(tool: str, said: dict[str, Any], key: str, ours: Any, tmp_path: Path):
    _, recipe = translated(tool, {**LEAST[tool], **said}, tmp_path)
    assert value(recipe, key) == ours


@pytest.mark.parametrize(
    ("tool", "said", "ours"),
    [
        ("axolotl", {"gradient_checkpointing": "offload"}, "offload"),
        ("axolotl", {"gradient_checkpointing": "unsloth"}, "offload"),
        ("llamafactory", {"use_unsloth_gc": True}, "offload"),
        ("trl", {"activation_offloading": True, "gradient_checkpointing": True}, "offload"),
        ("trl", {"activation_offloading": True, "gradient_checkpointing": False}, False),
        ("torchtune", {"enable_activation_checkpointing": True, "enable_activation_offloading": True}, "offload"),
        ("torchtune", {"enable_activation_checkpointing": True, "enable_activation_offloading": False}, True),
        ("torchtune", {"enable_activation_offloading": True}, False),
    ],
)
def test_activation_offloading_needs_checkpointing(tool: str, said: dict[str, Any], ours: Any, tmp_path: Path):
    made, recipe = translated(tool, {**LEAST[tool], **said}, tmp_path)
    assert recipe.training.gradient_checkpointing == ours
    left = {each.key for each in made.left} & said.keys()
    assert len(left) == (ours is False)


@pytest.mark.parametrize(
    ("tool", "keys"),
    [
        ("axolotl", {"rl": "dpo"}),
        ("axolotl", {"reward_model": True}),
        ("llamafactory", {"stage": "ppo"}),
        ("llamafactory", {"do_train": False}),
        ("trl", {"num_generations": 8}),
        ("torchtune", {"reward_fn": {"_component_": "x"}}),
        ("torchtune", {"loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"}}),
    ],
)
def test_other_trainings_are_refused_with_their_kind(tool: str, keys: dict[str, Any], tmp_path: Path):
    with pytest.raises(UnsupportedError) as caught:
        translated(tool, {**LEAST[tool], **keys}, tmp_path)
    assert caught.value.hint


def test_unknown_rows_become_a_placeholder(tmp_path: Path):
    config = {**LEAST["axolotl"], "datasets": [{"path": "my_registry_name", "type": "alpaca"}]}
    made, recipe = translated("axolotl", config, tmp_path)
    assert recipe.data.train[0].place.endswith(PLACEHOLDER)
    assert {each.key for each in made.left} == {"datasets", "data.train"}


@pytest.mark.parametrize(
    ("keys", "template"), [({}, "alpaca"), ({"chat_template": "chatml"}, None)], ids=["wording", "chat-template"]
)
def test_axolotl_type_alpaca_keeps_its_wording(keys: dict[str, Any], template: str | None, tmp_path: Path):
    """A chat template that the configuration names is the form of all rows, as a run has one."""
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "output": "b"}]')
    data = {"datasets": [{"path": str(tmp_path / "rows.json"), "type": "alpaca"}]}
    _, recipe = translated("axolotl", {**LEAST["axolotl"], **data, **keys}, tmp_path)
    assert recipe.data.train[0].prompt_text == template


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        ("", UsageError, "holds no keys"),
        ("- a", UsageError, "holds no keys"),
        ("a: [", RecipeError, "a value is missing"),
        ("model_name_or_path: null", UsageError, "names no model"),
    ],
)
def test_import_refuses_files_without_configuration(
    content: str, kind: type[FinetuneError], words: str, tmp_path: Path
):
    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(kind, match=words):
        imported("trl", file, tmp_path / "recipe.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        imported("trl", tmp_path / "none.yaml", tmp_path / "recipe.yaml")
    with pytest.raises(UsageError, match="cannot be imported"):
        imported("unsloth", file, tmp_path / "recipe.yaml")


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 5000), st.floats(-1, 2), st.sampled_from(["auto", "lora", "x,y", "a/b"]),
    st.just(""), st.lists(st.sampled_from(["q_proj", "wandb", "x y"]), max_size=2),
    st.just({"datasets": [{"path": "a.jsonl"}]}),
)  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
def test_random_configuration_becomes_valid_recipe_or_raises_finetune_error(tool: str, tmp_path: Path):
    keys = st.sampled_from(sorted(key for key in TOOLS[tool].rules if "." not in key))

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.dictionaries(keys, VALUES, max_size=12))
    def law(config: dict[str, Any]) -> None:
        try:
            made, _ = translated(tool, {**LEAST[tool], **config}, tmp_path)
        except FinetuneError:
            return
        assert made.carried >= 0

    law()


def test_import_command_writes_recipe_lists_left_keys_and_never_overwrites(tmp_path: Path):
    recipe = tmp_path / "new" / "recipe.yaml"
    arguments = ["import", "axolotl", str(FIXTURES / "axolotl.yaml"), str(recipe)]
    told = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert told.exit_code == 0, told.output
    assert "    line 54: logging_steps: ft logs every step," in told.stdout
    assert CliRunner().invoke(app, ["validate", str(recipe)]).exit_code == 0
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 6
    events = CliRunner().invoke(app, [*arguments, "--overwrite", "--json"]).stdout.splitlines()
    assert [json.loads(line)["event"] for line in events] == ["imported", *["not_carried"] * 9]


@pytest.mark.parametrize(
    ("tool", "keys", "expected"),
    [
        ("llamafactory", {"template": "llama3"}, {"chat_template": "llama3"}),
        ("llamafactory", {"template": "vicuna"}, {"chat_template": "vicuna"}),
        ("axolotl", {"chat_template": "mistral_v2v3"}, {"chat_template": "mistral"}),
        ("axolotl", {"chat_template": "tokenizer_default"}, {}),
        ("axolotl", {"chat_template": "jinja", "chat_template_jinja": "chat.jinja"}, {"chat_template": "chat.jinja"}),
        ("trl", {"chat_template_path": "templates/chat.jinja"}, {"chat_template": "templates/chat.jinja"}),
    ],
)
def test_import_of_template_sets_chat_template(
    tool: str, keys: dict[str, Any], expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    made, recipe = translated(tool, {**LEAST[tool], **keys}, tmp_path)
    found = recipe.model.chat_template
    assert found == (absolute(expected["chat_template"], tmp_path) if expected else None)
    assert not [each for each in made.left if "template" in each.key]


def absolute(template: str, folder: Path) -> str:
    return str(folder / template) if template.endswith(".jinja") else template


@pytest.mark.parametrize(
    ("tool", "key", "value", "reason"),
    [
        ("llamafactory", "template", "qwen3", "model.chat_template"),
        ("axolotl", "chat_template", "phi_4", "model.chat_template"),
        ("axolotl", "chat_template", "tokenizer_default_fallback_chatml", "model.chat_template: chatml"),
        ("axolotl", "chat_template_jinja", "{% for m in messages %}{% endfor %}", "into a file"),
        ("trl", "chat_template_path", "org/base", "chat_template.jinja"),
        ("torchtune", "tokenizer", {"prompt_template": "torchtune.data.ChatMLTemplate"}, "model.chat_template"),
    ],
)
def test_import_of_other_template_names_key_of_recipe(tool: str, key: str, value: Any, reason: str, tmp_path: Path):
    made, recipe = translated(tool, {**LEAST[tool], key: value}, tmp_path)
    assert recipe.model.chat_template is None
    (left,) = (each for each in made.left if each.key.startswith(key))
    assert reason in left.reason


@pytest.mark.parametrize(
    ("tool", "keys", "expected"),
    [
        ("axolotl", {"tokens": ["<a>", "<b>"]}, ["<a>", "<b>"]),
        ("llamafactory", {"add_tokens": "<a>, <b>"}, ["<a>", "<b>"]),
        ("llamafactory", {"add_special_tokens": "<c>", "add_tokens": "<a>", "resize_vocab": True}, ["<a>", "<c>!"]),
    ],
)
def test_import_of_tokens_to_add_sets_new_tokens(tool: str, keys: dict[str, Any], expected: list[str], tmp_path: Path):
    """`!` marks control tokens here."""
    _, recipe = translated(tool, {**LEAST[tool], **keys}, tmp_path)
    assert [each.token + "!" * each.special for each in recipe.model.new_tokens or ()] == expected


@pytest.mark.parametrize("thinks", [True, False])
def test_import_of_enable_thinking_sets_template_argument(thinks: bool, tmp_path: Path):
    _, recipe = translated("llamafactory", {**LEAST["llamafactory"], "enable_thinking": thinks}, tmp_path)
    assert recipe.data.template_arguments == {"enable_thinking": thinks}


def test_import_of_chat_template_kwargs_sets_template_arguments(tmp_path: Path):
    given = {"enable_thinking": False, "style": {"tone": 'so "so"'}}
    _, recipe = translated("axolotl", {**LEAST["axolotl"], "chat_template_kwargs": given}, tmp_path)
    assert recipe.data.template_arguments == given

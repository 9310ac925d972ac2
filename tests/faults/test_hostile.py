"""Models, adapters, templates, rows and checkpoints with embedded code: none of it runs or writes a file.

Every case plants code that would create a file, the canary. A control shows that the planted code works when something
does run it.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures.recipes import write_recipe
from tests.fixtures.tiny import CHAT_TEMPLATE

ROOT = Path(__file__).parents[2]
SECONDS = 120
"""For a whole `ft train` on a busy machine, most of it imports; a template that never ends must be cut short of it."""

pytestmark = pytest.mark.slow


class Payload:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.canary), "w"))


def code(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').close()\n"


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def pickled_weights(model: Path, canary: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Payload(canary)}, model / "pytorch_model.bin")


def pickle_named_as_safetensors(model: Path, canary: Path) -> None:
    (model / "model.safetensors").write_bytes(pickle.dumps(Payload(canary)))


def model_code(model: Path, canary: Path) -> None:
    (model / "evil.py").write_text(code(canary))
    change_json(model / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})


def model_code_of_a_new_type(model: Path, canary: Path) -> None:
    model_code(model, canary)
    change_json(model / "config.json", model_type="evil")


def kernel_from_the_hub(model: Path, canary: Path) -> None:
    change_json(model / "config.json", _attn_implementation_internal="evil/kernel", attn_implementation="evil/kernel")


def tokenizer_code(model: Path, canary: Path) -> None:
    (model / "evil.py").write_text(code(canary))
    auto_map = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    change_json(model / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="EvilTokenizer")


def template(text: str) -> Callable[[Path, Path], None]:
    def plant(model: Path, canary: Path) -> None:
        (model / "chat_template.jinja").write_text(text.replace("CANARY", str(canary)))

    return plant


def template_for_one_row(text: str) -> Callable[[Path, Path], None]:
    """A template that is that of the model but for rows that say 17."""
    return template("{% if '17' in messages[0].content %}" + text + "{% endif %}" + CHAT_TEMPLATE)


REACHING_OUT = (
    "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{% if c.__name__ == 'Popen' %}"
    "{{ c(['touch', 'CANARY']) }}{% endif %}{% endfor %}"
)
MODELS: dict[str, Callable[[Path, Path], None]] = {
    "pickled weights": pickled_weights,
    "pickle named as safetensors": pickle_named_as_safetensors,
    "model code": model_code,
    "model code of a new type": model_code_of_a_new_type,
    "kernel from the hub": kernel_from_the_hub,
    "tokenizer code": tokenizer_code,
    "template that reaches out": template(REACHING_OUT),
    "template that imports": template("{{ cycler.__init__.__globals__.os.system('touch CANARY') }}"),
    "template that never ends": template(
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
    ),
    "template that never ends for one row": template_for_one_row(
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
    ),
    "template that fills the memory": template("{{ 'a' * 9000000000 }}"),
    "template that fills the memory for one row": template_for_one_row("{{ 'a' * 9000000000 }}"),
    "template that divides by zero for one row": template_for_one_row("{{ 1 / 0 }}"),
    "template that grows": template(
        "{% set n = namespace(s='a') %}{% for i in range(34) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}"
    ),
}


def ft(folder: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `ft` with a home of its own, no network of the hub, and 6 GB of memory."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, 6 << 30))

    home = folder / "home"
    home.mkdir(exist_ok=True)
    keep = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return subprocess.run(
        [sys.executable, "-m", "cli", *map(str, arguments)],
        cwd=folder,
        env={
            **keep,
            "HOME": str(home),
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=SECONDS,
        preexec_fn=limit,
    )


def train(folder: Path, sections: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    return ft(folder, "train", write_recipe(sections, folder), "--run-dir", folder / "run", "--quiet")


@pytest.mark.parametrize("name", MODELS)
def test_hostile_model_runs_no_code(tiny_model: Path, tiny_recipe: dict[str, Any], tmp_path: Path, name: str):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    canary = tmp_path / "canary"
    MODELS[name](model, canary)
    result = train(tmp_path, {**tiny_recipe, "model": {"name": str(model)}})
    assert not canary.exists()
    assert "Traceback" not in result.stderr
    if name in ("model code", "kernel from the hub"):  # what it asks for is left out, and the rest is a model
        assert result.returncode in (0, 2), result.stderr
    else:
        assert result.returncode in (2, 3), result.stderr
        assert "->" in result.stderr


def test_planted_code_works_when_executed(tmp_path: Path):
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Payload(canary)))
    assert canary.exists()
    canary.unlink()
    exec(code(canary))
    assert canary.exists()


def test_hostile_adapter_and_checkpoint_run_no_code(tiny_recipe: dict[str, Any], tmp_path: Path):
    canary = tmp_path / "canary"
    assert train(tmp_path, tiny_recipe).returncode == 0
    run = tmp_path / "run"
    evil = {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}, "peft_type": "EVIL"}
    (tmp_path / "evil.py").write_text(code(canary))
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(evil))
    for folder in (run / "adapter", *run.glob("checkpoints/*")):
        for file in ("adapter_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            (folder / file).write_bytes(pickle.dumps(Payload(canary)))
    assert ft(tmp_path, "eval", run, "--quiet").returncode == 0
    (run / "adapter" / "adapter_model.safetensors").write_bytes(pickle.dumps(Payload(canary)))
    damaged = ft(tmp_path, "eval", run, "--quiet")
    assert damaged.returncode in (2, 6), damaged.stderr
    assert "Traceback" not in damaged.stderr
    assert not canary.exists()


def test_run_writes_only_to_its_directory_and_the_cache(tiny_recipe: dict[str, Any], tmp_path: Path):
    """What stands below the home, the working and the temporary folder, before and after."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    recipe = write_recipe(tiny_recipe, tmp_path)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    places = {"TMPDIR": str(temporary), "FT_CACHE": str(tmp_path / "cache")}
    for command in (
        ("train", recipe, "--run-dir", tmp_path / "run"),
        ("eval", tmp_path / "run"),
        ("merge", tmp_path / "run"),
    ):
        result = ft(tmp_path, *command, "--quiet", **places)
        assert result.returncode == 0, result.stderr
    after = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    strays = [
        path
        for path in after
        if not path.is_relative_to(tmp_path / "run") and not path.is_relative_to(tmp_path / "cache")
    ]
    assert not strays
    assert any(path.is_relative_to(tmp_path / "run") for path in after)

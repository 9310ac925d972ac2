"""The section of a model card about its use: commands that work in the folder of the card."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from finetune.jobs.export.card_recipe import base_reference
from finetune.jobs.load.trained_run import FineTunedRun
from finetune.recipe.sections.model import Model

EXAMPLE = "Hello"
"""A prompt."""


class Usage(NamedTuple):
    """A way to use what is in the folder.

    Attributes:
        what: Sentences before the code; may be empty.
        code: Commands, or a program.
        language: Of the code.
    """

    what: str
    code: str
    language: str = "sh"


def served_name(run: str) -> str:
    """The name of a run as engines take it for a model: ASCII letters, digits, dots, underscores and hyphens."""
    return re.sub(r"[^a-z0-9._-]+", "-", run.lower()).strip("-._") or "model"


def model_usage(trained: FineTunedRun, prompt: str = "") -> list[Usage]:
    """How a folder of plain weights is used.

    Args:
        trained: The run.
        prompt: Text before every prompt that the tokenizer does not add.
    """
    ask = f"ft generate . --prompt {shlex.quote(prompt + EXAMPLE)}"
    serve = f"vllm serve . --served-model-name {served_name(trained.run.path.name)}"
    note = "Every prompt begins with `prompt` of export.json, without special tokens before it." if prompt else ""
    return [Usage(note, f"{ask}\n{serve}")]


def quantized_usage() -> list[Usage]:
    """How a folder with the codes of a quantized base is used."""
    what = (
        "The weights are stored in the format of ft, which transformers and vLLM do not load. "
        "`ft merge --dtype bfloat16` writes the run in plain weights."
    )
    return [Usage(what, f"ft generate . --prompt {EXAMPLE}")]


def gguf_usage(trained: FineTunedRun, file: str) -> list[Usage]:
    """How a GGUF file with its Modelfile is used."""
    return [Usage("", f"llama-server -m {file}\nollama create {served_name(trained.run.path.name)} -f Modelfile")]


def gguf_adapter_usage(trained: FineTunedRun, file: str, options: str) -> list[Usage]:
    """How a GGUF adapter is used, with further options of llama-server."""
    section = trained.context.section
    if section.name.endswith(".gguf"):
        base = Path(section.name).name
        what = f"`{base}` is the base" + _of_package(section) + "."
    else:
        base = "base.gguf"
        what = "`base.gguf` is the base as a GGUF file, which convert_hf_to_gguf.py of llama.cpp writes."
    return [Usage(what, f"llama-server -m {shlex.quote(base)} --lora {file}{options}")]


def adapter_usage(trained: FineTunedRun, rank: int) -> list[Usage]:
    """How the folder of a LoRA adapter is used: in PEFT, and in vLLM where that loads the base.

    Args:
        trained: The run.
        rank: vLLM's --max-lora-rank.
    """
    section, recipe = trained.context.section, trained.context.recipe
    base, name = base_reference(recipe), served_name(trained.run.path.name)
    if section.name.endswith(".gguf"):
        what = f"`{Path(section.name).name}` is the base{_of_package(section)}. vLLM serves the folder that `ft merge` "
        return [Usage(what + "writes; PEFT loads the adapter.", _peft(section), "python")]
    ends = " --generation-config ." if trained.record.answer_ends else ""
    lora = f"--enable-lora --max-lora-rank {rank} --lora-modules {name}=."
    serve = f"vllm serve {shlex.quote(base)} {lora} --tokenizer .{ends}"
    what = "" if section.is_hub_id else f"`{base}` is the folder of the base."
    return [Usage(what, serve), Usage("PEFT loads it, too.", _peft(section, base), "python")]


def _of_package(section: Model) -> str:
    return f", a file of the Python package {_package(section)}" if section.name.startswith("package://") else ""


def _package(section: Model) -> str:
    return section.name.removeprefix("package://").partition("/")[0]


def _peft(section: Model, base: str = "") -> str:
    """A program that loads the adapter over its base."""
    lines = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if section.name.startswith("package://"):
        file = section.name.removeprefix("package://").partition("/")[2]
        # Located, not imported: importing a package may need others.
        lines = ["from importlib.util import find_spec", "", *lines]
        lines.append(f"folder = find_spec({json.dumps(_package(section))}).submodule_search_locations[0]")
        load = f"folder, gguf_file={json.dumps(file)}"
    elif section.name.endswith(".gguf"):
        load = f'".", gguf_file={json.dumps(Path(section.name).name)}'
    else:
        load = json.dumps(base)
    return "\n".join(
        [
            *lines,
            f"base = AutoModelForCausalLM.from_pretrained({load})",
            'model = PeftModel.from_pretrained(base, ".")',
            'tokenizer = AutoTokenizer.from_pretrained(".")',
        ]
    )

"""Model folders with damaged or forged files load, or are refused with a place and in time; nothing else happens."""

from __future__ import annotations

import json
import random
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import FinetuneError
from finetune.models.loading.load import generation_settings, load_model, load_tokenizer
from finetune.models.loading.model_files import find_model
from finetune.quantizers.choice import Quantizers
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.quantization import NoQuantization
from tests.fixtures.mutated_json import mutated

FAST, ALL = 40, 200
SECONDS = 20

FILES = (
    "config.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "header",
    "index",
)
"""Files that are changed, the most important one twice."""


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def damage(folder: Path, number: int) -> str:
    """Change one file of a model's folder; returns a description."""
    draw = random.Random(number)
    name = draw.choice(FILES)
    weights = folder / "model.safetensors"
    if name == "header":
        header, tensors = header_of(weights)
        content = json.dumps(mutated(header, draw)).encode()
        size = draw.choice([len(content), len(content), len(content), 0, 1 << 40, len(content) + 7])
        weights.write_bytes(struct.pack("<Q", size) + content + tensors)
    elif name == "index":
        weights.rename(folder / "model-00001-of-00001.safetensors")
        header, _ = header_of(folder / "model-00001-of-00001.safetensors")
        names = {tensor: "model-00001-of-00001.safetensors" for tensor in header if tensor != "__metadata__"}
        index = mutated({"metadata": {"total_size": 1}, "weight_map": names}, draw)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        file = folder / name
        file.write_text(json.dumps(mutated(json.loads(file.read_text()), draw)))
        if draw.random() < 0.1:
            file.write_bytes(file.read_bytes()[: draw.randrange(1, file.stat().st_size)])
    return name


def load(folder: Path) -> None:
    section = Model(name=str(folder))
    found = find_model(section, lambda work: None)
    tokenizer = load_tokenizer(found)
    generation_settings(folder)
    model = load_model(
        found,
        section,
        Quantizers(NoQuantization()),
        weight_dtype=torch.float32,
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
    )
    model(torch.tensor([tokenizer.encode("a b c")[:8] or [0]]))


def check(tiny_model: Path, tmp_path: Path, number: int) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    name = damage(folder, number)
    began, refusal = time.monotonic(), None
    try:
        load(folder)
    except FinetuneError as error:
        refusal = error
    assert time.monotonic() - began < SECONDS, name
    if refusal is not None:
        assert refusal.exit_code in (2, 6), f"{name}: {refusal}"
        assert refusal.where, f"{name}: {refusal}"


@pytest.mark.parametrize("number", range(FAST))
def test_damaged_folder_loads_or_is_refused(tiny_model: Path, tmp_path: Path, number: int):
    check(tiny_model, tmp_path, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(FAST, ALL))
def test_further_damaged_folder_loads_or_is_refused(tiny_model: Path, tmp_path: Path, number: int):
    check(tiny_model, tmp_path, number)

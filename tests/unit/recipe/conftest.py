"""A good recipe, and a way to load a text as if it were a recipe file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.errors import Problem, RecipeError
from finetune.recipe.load import LoadedRecipe, load_recipe

GOOD = """\
# QLoRA on every linear layer.
model: {name: HuggingFaceTB/SmolLM2-135M-Instruct}
quantization: {kind: nf4, double_quant: true}
adapter:
  method: lora
  r: 16
  alpha: 32
  target_modules: [q_proj, v_proj]
data:
  train:
    - path: tickets.jsonl
      format: chat
    - {path: ../facts.jsonl, format: instruction, output: answer}
  validation: [{path: held_out.jsonl, format: chat}]
  max_length: 1024
optimizer: {name: paged_adamw_8bit, learning_rate: 2e-4, betas: [0.9, 0.95]}
training:
  epochs: 1.5
  micro_batch_size: 4
  precision: auto
evaluation: {every_steps: 50}
run: {name: tickets-qlora}
"""

Load = Callable[..., LoadedRecipe]
Problems = Callable[..., list[Problem]]


@pytest.fixture
def good() -> str:
    return GOOD


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a text with overrides, from a file named recipe.yaml."""

    def load_text(text: str, *overrides: str) -> LoadedRecipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides)

    return load_text


@pytest.fixture
def problems(load: Load) -> Problems:
    """The problems that a text, with overrides, is refused for."""

    def problems_of(text: str, *overrides: str) -> list[Problem]:
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        return list(caught.value.problems)

    return problems_of

"""The recipe: all sections together."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from finetune.recipe.adapter import Adapter
from finetune.recipe.data import Data
from finetune.recipe.distributed import Distributed
from finetune.recipe.evaluation import Evaluation
from finetune.recipe.model import Model
from finetune.recipe.modules import ModuleRule
from finetune.recipe.optimizer import AdamW, Optimizer
from finetune.recipe.quantization import NoQuantization, Quantization
from finetune.recipe.run import Run
from finetune.recipe.section import OnResume, Section
from finetune.recipe.sweep import Sweep
from finetune.recipe.tracking import Tracker
from finetune.recipe.training import Training


class Recipe(Section):
    """The frozen description of a run. Defaults live here and nowhere else."""

    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    model: Model
    quantization: Quantization = NoQuantization()
    adapter: Adapter
    modules: list[ModuleRule] = Field([], description="What holds for single layers; of several rules, the first.")
    data: Data
    optimizer: Optimizer = AdamW(name="adamw")
    training: Training = Training()
    distributed: Distributed = Distributed()
    evaluation: Evaluation = Field(Evaluation())
    trackers: Annotated[list[Tracker], OnResume.MAY_CHANGE] = Field(
        [], description="Programs that follow the run beside its own metrics.jsonl."
    )
    run: Run = Run()
    sweep: Annotated[Sweep | None, OnResume.MAY_CHANGE] = Field(
        None, description="What `ft sweep` tries other values of; null for nothing."
    )

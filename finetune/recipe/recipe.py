"""The recipe: all sections."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from finetune.recipe.sections.adapter import Adapter
from finetune.recipe.sections.data import Data
from finetune.recipe.sections.distributed import Distributed
from finetune.recipe.sections.evaluation import Evaluation
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.modules import ModuleRule
from finetune.recipe.sections.optimizer import AdamW, Optimizer
from finetune.recipe.sections.prompt_text import PromptText
from finetune.recipe.sections.quantization import NoQuantization, Quantization
from finetune.recipe.sections.run import Run
from finetune.recipe.sections.section import OnResume, Section
from finetune.recipe.sections.sweep import Sweep
from finetune.recipe.sections.tracking import Tracker
from finetune.recipe.sections.training import Training


class Recipe(Section):
    """The immutable description of a run. Defaults are defined in the sections and nowhere else."""

    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    model: Model
    quantization: Quantization = NoQuantization()
    adapter: Adapter
    modules: list[ModuleRule] = Field([], description="Settings of single layers; the first matching rule applies.")
    data: Data
    optimizer: Optimizer = AdamW(name="adamw")
    training: Training = Training()
    distributed: Distributed = Distributed()
    evaluation: Evaluation = Field(Evaluation())
    trackers: Annotated[list[Tracker], OnResume.MAY_CHANGE] = Field(
        [], description="Experiment trackers, in addition to the run's metrics.jsonl."
    )
    run: Run = Run()
    sweep: Annotated[Sweep | None, OnResume.MAY_CHANGE] = Field(
        None, description="Keys and values that `ft sweep` searches; null for no sweep."
    )

    @field_validator("quantization", mode="before")
    @classmethod
    def _empty_quantization_is_none(cls, section: Any) -> Any:
        """`quantization: {}` is no quantization: a tagged union has no default tag."""
        return {"kind": "none"} if section == {} else section

    @property
    def chat_template(self) -> str | PromptText | None:
        """The chat template in place of the base's: that of the model, or of the first source with a text."""
        texts = [each.prompt_text for each in self.data.sources if each.prompt_text is not None]
        return self.model.chat_template or next(iter(texts), None)

    @property
    def sample_seed(self) -> int:
        """Seed of samples of rows."""
        return self.training.seed if self.data.sample_seed is None else self.data.sample_seed

    @property
    def named_tokens(self) -> list[str]:
        """Tokens that are added or that train by name."""
        return [*self.model.new_texts, *self.adapter.named_tokens]

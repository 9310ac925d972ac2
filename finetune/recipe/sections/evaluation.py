"""Section `evaluation`: what is measured on the held-out rows and in tasks, and when."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from finetune.recipe.sections.data import Source
from finetune.recipe.sections.section import OnResume, Section

MetricName = Literal["exact_match", "f1", "accuracy", "rouge1", "rouge2", "rouge_l", "bleu", "chrf", "json_valid"]

VALIDATION = "validation"
"""Name of the task that measures the validation rows of a recipe."""

EARLIER_TASK_NAMES = {"held_out": VALIDATION}
"""Names of earlier versions and their current names. They are read in `--tasks`, in `--gate` and in `results.json`."""


def current_task_name(name: str) -> str:
    """The name of a task in this version; other names are returned unchanged."""
    return EARLIER_TASK_NAMES.get(name, name)


class Answers(Section):
    """How answers are generated and scored."""

    on_resume: ClassVar[OnResume] = OnResume.MAY_CHANGE
    metrics: list[MetricName] = Field(
        ["exact_match", "f1"],
        description=(
            "What answers are scored by, what a model thinks first left out, up to `</think>`. Of several references "
            "the best counts. `accuracy` is an exact match but for case, punctuation and articles; `bleu` and `chrf` "
            "are in [0, 100] and over all answers together."
        ),
    )
    pattern: str | None = Field(
        None, description="A regular expression that passes an answer in which it is found, as the metric `pattern`."
    )
    max_new_tokens: int = Field(128, ge=1, description="Longest answer in tokens.")

    @field_validator("pattern")
    @classmethod
    def _is_an_expression(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"this is no regular expression: {error}") from None
        return pattern


class TaskSection(Section):
    """Something to measure in `ft eval`."""

    implementation: ClassVar[str]
    on_resume: ClassVar[OnResume] = OnResume.MAY_CHANGE
    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", description="What it is called in results and gates.")


class RowsTask(TaskSection):
    """A task on rows of one's own."""

    data: Source = Field(description="The rows: a source as in `data.train`.")

    @field_validator("data", mode="before")
    @classmethod
    def _format_is_auto_by_default(cls, source: Any) -> Any:
        """A tagged union has no default tag of its own."""
        return {"format": "auto", **source} if isinstance(source, dict) else source


class GenerateTask(RowsTask, Answers):
    """Answers written by the model and compared with the rows' own."""

    implementation: ClassVar[str] = "finetune.evaluation.tasks:Generate"
    kind: Literal["generate"]


class ChooseTask(RowsTask):
    """Choices, of which the model finds one likeliest, and whether it is the right one."""

    implementation: ClassVar[str] = "finetune.evaluation.tasks:Choose"
    kind: Literal["choose"]
    choices: list[str] = Field(
        [], description="The answers to choose from; by default those that a row of `multiple_choice` offers."
    )


class LossTask(RowsTask):
    """Loss and perplexity per trained token."""

    implementation: ClassVar[str] = "finetune.evaluation.tasks:Loss"
    kind: Literal["loss"]


class HarnessTask(TaskSection):
    """A task of lm-evaluation-harness, by its name there."""

    implementation: ClassVar[str] = "finetune.evaluation.harness:Harness"
    kind: Literal["lm_eval"]
    shots: int | None = Field(None, ge=0, description="Examples before the question; by default as the task has it.")
    chat_template: bool | None = Field(
        None, description="Whether prompts go through the chat template; by default as the rows of the training did."
    )


Task = Annotated[GenerateTask | ChooseTask | LossTask | HarnessTask, Field(discriminator="kind")]


class TaskList(Section):
    """The section `evaluation` of a file of tasks."""

    on_resume: ClassVar[OnResume] = OnResume.MAY_CHANGE
    tasks: list[Task] = Field(min_length=1, description="Further tasks of `ft eval`.")


class TaskFile(Section):
    """A file of tasks: a recipe with nothing but those."""

    on_resume: ClassVar[OnResume] = OnResume.MAY_CHANGE
    evaluation: TaskList


class Evaluation(Answers):
    """Held-out loss during training; loss, answers and further tasks in `ft eval`."""

    every_steps: int | None = Field(
        None, ge=1, description="Measure the held-out loss every so many steps; null for the end only."
    )
    max_rows: int | None = Field(None, ge=1, description="Held-out rows to measure the loss on; null for all.")
    batch_size: int = Field(
        16,
        ge=1,
        description="Rows in one pass, or the tokens of so many where rows begin alike; fewer where memory is short.",
    )
    generation_rows: int = Field(
        64, ge=0, description="Held-out rows to answer by generation in `ft eval`; 0 for none."
    )
    sample_rows: int = Field(
        0, ge=0, description="Held-out rows to answer whenever the held-out loss is measured in training; 0 for none."
    )
    patience: Annotated[int | None, OnResume.FROZEN] = Field(
        None,
        ge=1,
        description=(
            "Stop when so many measurements in a row have not lowered the held-out loss, and keep the weights of the "
            "lowest; null to train to the end and keep the last."
        ),
    )
    tasks: list[Task] = Field([], description="Further tasks of `ft eval`.")

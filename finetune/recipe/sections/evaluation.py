"""Section `evaluation`: validation during training, and the tasks of `ft eval`."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from finetune.recipe.sections.data import Source
from finetune.recipe.sections.section import OnResume, Section

CallMetricName = Literal["call_decision", "call_format", "call_name", "call_arguments", "call_argument_f1"]

TextMetricName = Literal["exact_match", "f1", "accuracy", "rouge1", "rouge2", "rouge_l", "bleu", "chrf", "json_valid"]
ClassMetricName = Literal["macro_f1"]
MetricName = Literal[TextMetricName, ClassMetricName, CallMetricName]

VALIDATION = "validation"
"""Name of the task that measures the validation rows of a recipe."""

EARLIER_TASK_NAMES = {"held_out": VALIDATION}
"""Names of earlier versions and their current names. They are read in `--tasks`, in `--gate` and in `results.json`."""


RENAMED_TASK = "validation_task"
"""Name, in runs of version 0.1, of a task of the recipe that was called `validation`: there the name was free."""


def current_task_name(name: str) -> str:
    """The name of a task in this version; other names are returned unchanged."""
    return EARLIER_TASK_NAMES.get(name, name)


class Answers(Section):
    """How answers are generated and scored."""

    on_resume: ClassVar[OnResume] = OnResume.MAY_CHANGE
    metrics: list[MetricName] = Field(
        ["exact_match", "f1"],
        description=(
            "Metrics of generated answers; text up to `</think>` is ignored. With several references the best score "
            "counts. `accuracy` is an exact match that ignores case, punctuation and articles; `bleu` and `chrf` "
            "are corpus scores in [0, 100]. `macro_f1`: the mean of the F1 of each label; it is measured beside "
            "`exact_match` where rows have format `classification`, or few answers that repeat, and wherever it is "
            "named. Rows with tools are scored by their calls too, all five unless some are "
            "named. `call_decision`: the answer calls a tool if and only if the row does. Of rows that call: "
            "`call_format`: well-formed calls in the form of the chat template; `call_name`: the same tools; "
            "`call_arguments`: and the same arguments, exactly; `call_argument_f1`: F1 of single arguments, by key and "
            "value. The order of calls does not matter."
        ),
    )
    pattern: str | None = Field(
        None, description="Regular expression; the metric `pattern` is the fraction of answers in which it is found."
    )
    turns: Literal["last", "all"] = Field(
        "last",
        description=(
            "Answers of a conversation that are generated and scored. last: the last one. all: each one, after the "
            "turns that the row has before it, for dialogues that call tools on the way."
        ),
    )
    max_new_tokens: int = Field(128, ge=1, description="Maximum length of a generated answer in tokens.")

    @field_validator("pattern")
    @classmethod
    def _is_an_expression(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"this is not a regular expression: {error}") from None
        return pattern


class TaskSection(Section):
    """A task of `ft eval`."""

    implementation: ClassVar[str]
    on_resume: ClassVar[OnResume] = OnResume.MAY_CHANGE
    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", description="Name of the task in results and gates.")


class RowsTask(TaskSection):
    """A task on rows of a source."""

    data: Source | None = Field(
        None, description="The rows: a source as in `data.train`. Null for the validation rows of the recipe."
    )

    @field_validator("data", mode="before")
    @classmethod
    def _format_is_auto_by_default(cls, source: Any) -> Any:
        """Fill in `format: auto`: a tagged union has no default tag."""
        return {"format": "auto", **source} if isinstance(source, dict) else source


class GenerateTask(RowsTask, Answers):
    """Generated answers, compared with those of the rows."""

    implementation: ClassVar[str] = "finetune.evaluation.tasks:Generate"
    kind: Literal["generate"]


class ChooseTask(RowsTask):
    """Multiple choice: the choice with the highest log-probability, compared with the correct one."""

    implementation: ClassVar[str] = "finetune.evaluation.choices:Choose"
    kind: Literal["choose"]
    choices: list[str] = Field(
        [],
        description=(
            "The choices of all rows; by default the `labels` of a source of format `classification`, or those of "
            "each row of format `multiple_choice`. Choices of all rows are labels: `ft eval` measures macro-F1, a "
            "table by label and a confusion matrix."
        ),
    )


class LossTask(RowsTask):
    """Loss and perplexity per target token."""

    implementation: ClassVar[str] = "finetune.evaluation.tasks:Loss"
    kind: Literal["loss"]


class HarnessTask(TaskSection):
    """A task of lm-evaluation-harness, named as there."""

    implementation: ClassVar[str] = "finetune.evaluation.harness:Harness"
    kind: Literal["lm_eval"]
    shots: int | None = Field(None, ge=0, description="Few-shot examples; by default the task's number.")
    chat_template: bool | None = Field(
        None, description="Render prompts with the chat template; by default as in training."
    )


Task = Annotated[GenerateTask | ChooseTask | LossTask | HarnessTask, Field(discriminator="kind")]


class TaskList(Section):
    """The section `evaluation` of a file of tasks."""

    on_resume: ClassVar[OnResume] = OnResume.MAY_CHANGE
    tasks: list[Task] = Field(min_length=1, description="Further tasks of `ft eval`.")


class TaskFile(Section):
    """The tasks of a file, where a recipe has them."""

    on_resume: ClassVar[OnResume] = OnResume.MAY_CHANGE
    evaluation: TaskList


class Evaluation(Answers):
    """Validation loss during training; loss, generated answers and further tasks in `ft eval`."""

    every_steps: int | None = Field(
        None, ge=1, description="Compute the validation loss every N steps; null for the end only."
    )
    max_rows: int | None = Field(None, ge=1, description="Number of validation rows for the loss; null for all.")
    batch_size: int = Field(
        16,
        ge=1,
        description="Rows per forward pass, or as many tokens if rows have a shared prefix; fewer if memory is short.",
    )
    generation_rows: int = Field(
        64, ge=0, description="Number of validation rows to generate answers for in `ft eval`; 0 for none."
    )
    sample_rows: int = Field(
        0, ge=0, description="Number of validation rows to generate answers for at each validation; 0 for none."
    )
    patience: Annotated[int | None, OnResume.FROZEN] = Field(
        None,
        ge=1,
        description=(
            "Early stopping: stop after N consecutive validations without a lower loss, and keep the weights of the "
            "lowest loss; null to train to the end and keep the last weights."
        ),
    )
    tasks: list[Task] = Field([], description="Further tasks of `ft eval`.")

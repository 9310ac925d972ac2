"""Section `trackers`: programs that follow a run beside its own `metrics.jsonl`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from finetune.recipe.sections.section import OnResume, Section


class TrackerSection(Section):
    """What every tracker has: an implementation, and a package of the same name that it needs.

    Access tokens have no key: each package reads its own environment variable or login.
    """

    on_resume: ClassVar[OnResume] = OnResume.MAY_CHANGE
    implementation: ClassVar[str]
    name: str


class TensorBoard(TrackerSection):
    """Event files in the run directory, for `tensorboard --logdir runs`."""

    implementation: ClassVar[str] = "finetune.run.trackers.clients:TensorBoardTracker"
    name: Literal["tensorboard"]


class Wandb(TrackerSection):
    """Weights & Biases. Neither code, arguments, environment nor console are sent."""

    implementation: ClassVar[str] = "finetune.run.trackers.clients:WandbTracker"
    name: Literal["wandb"]
    project: str | None = Field(None, min_length=1, description="Project; null for WANDB_PROJECT or the account's.")
    offline: bool = Field(False, description="Write to the run directory only; `wandb sync` sends it later.")


class Mlflow(TrackerSection):
    """MLflow, on the server that MLFLOW_TRACKING_URI names or else in a database in the run directory."""

    implementation: ClassVar[str] = "finetune.run.trackers.clients:MlflowTracker"
    name: Literal["mlflow"]
    experiment: str = Field("ft", min_length=1, description="Experiment.")
    offline: bool = Field(False, description="Write to the run directory whatever the environment says.")


class Trackio(TrackerSection):
    """Trackio, on this machine and, where a Space is named, there."""

    implementation: ClassVar[str] = "finetune.run.trackers.clients:TrackioTracker"
    name: Literal["trackio"]
    project: str = Field("ft", min_length=1, description="Project.")
    space: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$", description="Space of the hub: owner/name.")


Tracker = Annotated[TensorBoard | Wandb | Mlflow | Trackio, Field(discriminator="name")]

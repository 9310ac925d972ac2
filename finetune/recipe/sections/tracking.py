"""Section `trackers`: experiment trackers, in addition to the run's `metrics.jsonl`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from finetune.recipe.sections.section import OnResume, Section


class TrackerSection(Section):
    """Base class of all trackers; each needs the Python package of its name.

    There is no key for access tokens: each package reads its own environment variable or login.
    """

    on_resume: ClassVar[OnResume] = OnResume.MAY_CHANGE
    implementation: ClassVar[str]
    name: str


class TensorBoard(TrackerSection):
    """Event files in the run directory, for `tensorboard --logdir runs`."""

    implementation: ClassVar[str] = "finetune.run.trackers.clients:TensorBoardTracker"
    name: Literal["tensorboard"]


class Wandb(TrackerSection):
    """Weights & Biases. Code, arguments, environment and console output are not sent."""

    implementation: ClassVar[str] = "finetune.run.trackers.clients:WandbTracker"
    name: Literal["wandb"]
    project: str | None = Field(
        None, min_length=1, description="Project; null for WANDB_PROJECT or the account's default."
    )
    offline: bool = Field(False, description="Write to the run directory only; `wandb sync` uploads it later.")


class Mlflow(TrackerSection):
    """MLflow: the server in MLFLOW_TRACKING_URI, or else a database in the run directory."""

    implementation: ClassVar[str] = "finetune.run.trackers.clients:MlflowTracker"
    name: Literal["mlflow"]
    experiment: str = Field("ft", min_length=1, description="Name of the experiment.")
    offline: bool = Field(False, description="Write to the run directory and ignore MLFLOW_TRACKING_URI.")


class Trackio(TrackerSection):
    """Trackio, on this machine and in a Space if one is given."""

    implementation: ClassVar[str] = "finetune.run.trackers.clients:TrackioTracker"
    name: Literal["trackio"]
    project: str = Field("ft", min_length=1, description="Project.")
    space: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$", description="Space on the hub: owner/name.")


Tracker = Annotated[TensorBoard | Wandb | Mlflow | Trackio, Field(discriminator="name")]

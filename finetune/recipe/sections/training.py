"""Section `training`: how long, in what batches, in what precision."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from finetune.recipe.sections.section import OnResume, Section

Precision = Literal["auto", "float32", "bfloat16", "float16"]

Checkpointing = Literal["selective", "offload"] | bool


def recomputes_blocks(checkpointing: Checkpointing) -> bool:
    """Whether backward computes whole blocks again."""
    return checkpointing in (True, "offload")


class Training(Section):
    """The loop."""

    @property
    def recomputes_blocks(self) -> bool:
        """Whether backward computes whole blocks again."""
        return recomputes_blocks(self.gradient_checkpointing)

    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    epochs: Annotated[float, OnResume.EXTENDS] = Field(
        1.0, gt=0, description="Passes over the training rows; may be a fraction."
    )
    max_steps: Annotated[int | None, OnResume.EXTENDS] = Field(
        None, ge=1, description="Optimizer steps; replaces epochs."
    )
    micro_batch_size: Annotated[int, OnResume.MAY_CHANGE] = Field(
        4, ge=1, description="Most rows, or packs, in one forward pass of one process."
    )
    gradient_accumulation_steps: Annotated[int, OnResume.MAY_CHANGE] = Field(
        4,
        ge=1,
        description=(
            "Micro-batches of an optimizer step. Several processes share them out, so that a step sees the same rows "
            "whatever their number."
        ),
    )
    batching: Literal["auto", "padded", "padding_free", "packed"] = Field(
        "auto",
        description=(
            "How rows are laid out. padded: rows of similar length, filled up. padding_free: the same rows, one after "
            "the other, which changes speed and memory but not the result. packed: rows are put together into packs "
            "of up to pack_length tokens first, and what counts as a row of a batch is a pack. auto: padding_free, or "
            "padded where the method or the model cannot keep rows in one line apart."
        ),
    )
    prefix_sharing: Annotated[Literal["auto", "never"], OnResume.MAY_CHANGE] = Field(
        "auto",
        description=(
            "auto: tokens that rows in one line begin with alike, such as a system prompt, are computed once for all, "
            "up to the first that is trained; loss and gradient are the same. Not where dropout or noise is drawn for "
            "each row, and only with model.attention: auto. never: each row with all its tokens."
        ),
    )
    pack_length: int | None = Field(
        None, ge=8, description="Tokens of one pack; by default data.max_length, and never less."
    )
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Gradients with a larger norm are scaled down to it; null for no limit."
    )
    precision: Precision = Field(
        "auto",
        description=(
            "Compute type. `auto`: bfloat16 where the device has instructions for it, float32 elsewhere. "
            "float16 needs a GPU."
        ),
    )
    neftune_alpha: float | None = Field(
        None, gt=0, description="Noise on embeddings while training (NEFTune, arXiv 2310.05914); 5 is a usual value."
    )
    gradient_checkpointing: Annotated[Checkpointing, OnResume.MAY_CHANGE] = Field(
        False,
        description=(
            "Less memory, more time. true: keep only each block's input and recompute the rest in backward. "
            "`selective`: recompute only what layers that widen put out (gate and up): half of what is kept, for a "
            "quarter more products, where true takes a half more. `offload`: as true, and the inputs wait in the "
            "machine's memory and not in the GPU's, for long rows."
        ),
    )
    dry_run: Annotated[Literal["auto"] | bool, OnResume.MAY_CHANGE] = Field(
        "auto",
        description=(
            "Walk the whole path once before the first step, on the longest rows: forward, backward, step, held-out "
            "loss, checkpoint, reading it back, merging a layer; then put everything back. auto: for runs of 200 steps "
            "or more, where it takes less than a fiftieth of the time."
        ),
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of initialisation, order of rows and dropout.")
    checkpoint_every_steps: Annotated[int | None, OnResume.MAY_CHANGE] = Field(
        None,
        ge=1,
        description=(
            "Save what it takes to go on every so many steps; null for every five minutes, or more seldom where saving "
            "would take more than a twentieth of the time. Saved at the end and on a signal in any case."
        ),
    )
    checkpoints_kept: Annotated[int, OnResume.MAY_CHANGE] = Field(
        2, ge=1, description="Checkpoints to keep; the second one is for the case that the last is damaged."
    )

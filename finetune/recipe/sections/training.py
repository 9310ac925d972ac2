"""Section `training`: length, batches, precision, memory and checkpoints."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from finetune.recipe.sections.section import OnResume, Section

Precision = Literal["auto", "float32", "bfloat16", "float16"]

Checkpointing = Literal["selective", "offload"] | bool


def recomputes_blocks(checkpointing: Checkpointing) -> bool:
    """Whether backward recomputes full blocks."""
    return checkpointing in (True, "offload")


class Training(Section):
    """The training loop."""

    @property
    def recomputes_blocks(self) -> bool:
        """Whether backward recomputes full blocks."""
        return recomputes_blocks(self.gradient_checkpointing)

    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    epochs: Annotated[float, OnResume.EXTENDS] = Field(
        1.0, gt=0, description="Epochs over the training rows; may be a fraction."
    )
    max_steps: Annotated[int | None, OnResume.EXTENDS] = Field(
        None, ge=1, description="Optimizer steps; replaces epochs."
    )
    micro_batch_size: Annotated[int, OnResume.MAY_CHANGE] = Field(
        4, ge=1, description="Maximum number of rows, or packs, in one forward pass of one process."
    )
    gradient_accumulation_steps: Annotated[int, OnResume.MAY_CHANGE] = Field(
        4,
        ge=1,
        description=(
            "Micro-batches per optimizer step, over all processes: the global batch size is micro_batch_size times "
            "this, whatever the number of processes."
        ),
    )
    batching: Literal["auto", "padded", "padding_free", "packed"] = Field(
        "auto",
        description=(
            "Batch layout. padded: rows of similar length, padded. padding_free: the same rows flattened into one "
            "sequence, which changes speed and memory but not the result. packed: rows are first packed up to "
            "pack_length tokens, and a batch consists of packs. auto: padding_free, or padded if the method or the "
            "model cannot isolate flattened rows."
        ),
    )
    prefix_sharing: Annotated[Literal["auto", "never"], OnResume.MAY_CHANGE] = Field(
        "auto",
        description=(
            "auto: the shared prefix of flattened rows, such as a system prompt, is computed once, up to the first "
            "target token; loss and gradients are the same. Off with per-row dropout or noise, and unless "
            "model.attention is auto. never: compute every row in full."
        ),
    )
    pack_length: int | None = Field(
        None, ge=8, description="Maximum tokens of a pack; at least data.max_length, which is the default."
    )
    max_grad_norm: float | None = Field(1.0, gt=0, description="Gradient clipping by global norm; null for none.")
    precision: Precision = Field(
        "auto",
        description=(
            "Compute type. `auto`: bfloat16 if the device has native support, else float32. float16 needs a GPU."
        ),
    )
    neftune_alpha: float | None = Field(
        None, gt=0, description="Noise on embeddings while training (NEFTune, arXiv 2310.05914); 5 is a usual value."
    )
    gradient_checkpointing: Annotated[Checkpointing, OnResume.MAY_CHANGE] = Field(
        False,
        description=(
            "Activation recomputation: less memory, more time. true: save only each block's input and recompute the "
            "rest in backward, for half as many matmuls again. `selective`: recompute only the outputs of the up "
            "projections (gate and up), for about half the activations and a quarter more matmuls. `offload`: as true, "
            "with the inputs in CPU memory, for long rows."
        ),
    )
    dry_run: Annotated[Literal["auto"] | bool, OnResume.MAY_CHANGE] = Field(
        "auto",
        description=(
            "Dry run before the first step, on the longest rows: forward, backward, optimizer step, validation loss, "
            "checkpoint, reading it back, merge of a layer; then the state is restored. auto: for runs of 200 steps or "
            "more, where it takes less than 2 % of the time."
        ),
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of initialization, order of rows and dropout.")
    checkpoint_every_steps: Annotated[int | None, OnResume.MAY_CHANGE] = Field(
        None,
        ge=1,
        description=(
            "Save a checkpoint every N steps; null for every five minutes, or less often if saving would take more "
            "than 5 % of the time. A checkpoint is always saved at the end and on a signal."
        ),
    )
    checkpoints_kept: Annotated[int, OnResume.MAY_CHANGE] = Field(
        2, ge=1, description="Number of checkpoints to keep; the second is a backup in case the last is damaged."
    )

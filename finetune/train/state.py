"""The mutable state of training."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import nn

from finetune.adapters.base import AdapterMethod
from finetune.models.fsdp import sharded_trainable_params
from finetune.models.loading.dtype import autocast
from finetune.run.signals import Interruption


@dataclass
class TrainState:
    """Model, optimizer and counters; `checkpoint.py` writes and reads all of it.

    Attributes:
        accelerator: Ranks and devices.
        model: The trainable model, wrapped by DDP if there are several ranks.
        method: The adapter method, for its part of a step.
        optimizer: Optimizer of the trainable parameters.
        compute_dtype: Dtype of the forward pass.
        noise: Scale of NEFTune's noise on embeddings; None for none.
        scaler: Loss scaling for float16 gradients; inactive otherwise.
        interruption: Polled where a step can still be abandoned.
        step: Optimizer steps done.
        tokens: Tokens seen by all ranks, without padding.
        seconds: Training time over all attempts.
        loss: Loss of the last step, in nats; None before the first.
        validation_step: Step of the latest validation.
        validation_loss_before: Validation loss before the first step, in nats.
    """

    accelerator: Accelerator
    model: nn.Module
    method: AdapterMethod
    optimizer: torch.optim.Optimizer
    compute_dtype: torch.dtype
    scaler: torch.amp.GradScaler = field(init=False)
    interruption: Interruption = field(default_factory=Interruption)
    noise: float | None = None
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    validation_step: int | None = None
    validation_loss_before: float | None = None

    def __post_init__(self) -> None:
        device = self.accelerator.device.type
        self.scaler = torch.amp.GradScaler(device, enabled=self.compute_dtype is torch.float16)

    @property
    def is_sharded(self) -> bool:
        """Whether trainable parameters are sharded, so that every rank takes part in saving."""
        return bool(sharded_trainable_params(self.bare_model))

    def agreed_by_main(self, flag: bool) -> bool:
        """Rank 0's value of `flag` if parameters are sharded, else the local value.

        With sharded parameters saving is a collective: ranks that decided differently would deadlock.
        """
        if not self.is_sharded:
            return flag
        return self.agreed_by_any(flag and self.accelerator.is_main_process)

    def agreed_by_any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank if parameters are sharded, else the local value."""
        if not self.is_sharded:
            return flag
        flags = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flags, "sum"))

    @property
    def bare_model(self) -> nn.Module:
        """The model without its DDP wrapper."""
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    def autocast(self) -> torch.autocast:
        """The autocast context of a forward pass in the compute dtype."""
        return autocast(self.accelerator.device, self.compute_dtype)

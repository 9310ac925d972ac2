"""All that changes during a run."""

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
        accelerator: Processes and devices.
        model: The trainable model, wrapped for several processes where there are any.
        method: The adapter method, for its part of a step.
        optimizer: Over the trainable parameters.
        compute_dtype: Type of the forward pass.
        noise: Size of the noise on embeddings while training, if any.
        scaler: Scales the loss where gradients are float16; inactive otherwise.
        interruption: Looked at where a step can be left undone.
        step: Optimizer steps done.
        tokens: Tokens seen by all processes, padding not counted.
        seconds: Since training began, in all attempts together.
        loss: Of the last step, in nats; None before the first.
        held_out_step: Step after which the held-out loss was last measured.
        held_out_before: The held-out loss before the first step, in nats.
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
        """Whether processes hold shares of what trains, so that all of them have to save it together."""
        return bool(sharded_trainable_params(self.bare_model))

    def agreed_by_main(self, word: bool) -> bool:
        """What the main process says, where processes hold shares and act together; elsewhere `word`."""
        if not self.is_sharded:
            return word
        return self.agreed_by_any(word and self.accelerator.is_main_process)

    def agreed_by_any(self, word: bool) -> bool:
        """Whether any process says so, where processes hold shares and act together; elsewhere `word`."""
        if not self.is_sharded:
            return word
        said = torch.tensor(float(word), device=self.accelerator.device)
        return bool(self.accelerator.reduce(said, "sum"))

    @property
    def bare_model(self) -> nn.Module:
        """The model without its wrapper for several processes."""
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    def autocast(self) -> torch.autocast:
        """The context of a forward pass in the compute type."""
        return autocast(self.accelerator.device, self.compute_dtype)

"""All that changes during a run."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import nn

from finetune.adapters.base import AdapterMethod


@dataclass
class TrainState:
    """Model, optimizer and counters; what a checkpoint would have to hold.

    Attributes:
        accelerator: Processes and devices.
        model: The trainable model, wrapped for several processes where there are any.
        method: The adapter method, for its part of a step.
        optimizer: Over the trainable parameters.
        compute_dtype: Type of the forward pass.
        scaler: Scales the loss where gradients are float16; inactive otherwise.
        step: Optimizer steps done.
        tokens: Tokens seen by all processes, padding not counted.
    """

    accelerator: Accelerator
    model: nn.Module
    method: AdapterMethod
    optimizer: torch.optim.Optimizer
    compute_dtype: torch.dtype
    scaler: torch.amp.GradScaler = field(init=False)
    step: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        device = self.accelerator.device.type
        self.scaler = torch.amp.GradScaler(device, enabled=self.compute_dtype is torch.float16)

    @property
    def bare_model(self) -> nn.Module:
        """The model without its wrapper for several processes."""
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    def autocast(self) -> torch.autocast:
        """The context of a forward pass in the compute type."""
        return torch.autocast(
            self.accelerator.device.type, self.compute_dtype, enabled=self.compute_dtype is not torch.float32
        )

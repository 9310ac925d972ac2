"""Quantizers: storing a linear layer's frozen weight in few bits, and dequantizing it."""

import finetune.quantizers.lazy_compile  # noqa: F401  before PEFT and others import bitsandbytes

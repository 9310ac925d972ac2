"""How a linear layer's frozen weight is stored, and how to have it back."""

import finetune.quantizers.lazy_compile  # noqa: F401  before PEFT and others import bitsandbytes

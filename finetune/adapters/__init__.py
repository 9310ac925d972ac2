"""What is trained on a frozen base, and how it merges."""

import finetune.quantizers  # noqa: F401  before PEFT imports bitsandbytes

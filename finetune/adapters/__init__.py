"""Training methods: adapters on a frozen base, and full fine-tuning."""

import finetune.quantizers  # noqa: F401  before PEFT imports bitsandbytes

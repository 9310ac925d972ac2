"""Fine-tuning of causal language models: the library behind the `ft` command."""

__version__ = "0.1.0"

"""From a recipe's model to a tokenizer and a causal language model on a device."""

"""Configurations of other fine-tuning tools as recipes: one table of translation for each."""

"""The recipe: its schema, and how a YAML file becomes one. Never imports torch."""

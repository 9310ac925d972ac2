"""Translation of other tools' configurations to recipes: one table of rules per tool."""

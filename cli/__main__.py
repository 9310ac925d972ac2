"""`python -m ft_cli`: the command without its script, as launchers start it."""

from .start import run

run()

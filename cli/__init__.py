"""The `ft` command: it parses, calls one job, and renders what the job returns."""

"""Readers of local files: one module for each kind of file; `files.py` has the table of them."""

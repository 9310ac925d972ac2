"""Readers of local files: each kind of file becomes rows, one kind a module; `files.py` has the table of them."""

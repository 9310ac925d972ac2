"""Use cases, one a file: each takes a recipe or a run and returns a result; none of them prints."""

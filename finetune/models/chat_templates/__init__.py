"""Chat templates of families of models, for bases that have none: one Jinja file each."""

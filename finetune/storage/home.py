"""The user's home folder, which a user without an entry in /etc/passwd may not have."""

from __future__ import annotations

import os

from finetune.errors import EnvironmentFault


def expand_home(path: str) -> str:
    """`path` with `~` or `~user` at its beginning replaced by the home folder; unchanged where no user has that name.

    Raises:
        EnvironmentFault: The path begins with `~`, and the user of this process has no home.
    """
    expanded = os.path.expanduser(path)
    if expanded == path and (path == "~" or path.startswith("~/")):
        raise EnvironmentFault(
            "~ stands for the home folder, and this user has none", where=path, hint="set HOME, or write the whole path"
        )
    return expanded

"""`--push`: the upload of an exported folder to the hub."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from finetune.errors import UsageError
from finetune.run.events import EventHandler, Phase

logger = logging.getLogger(__name__)


def check_repository(name: str) -> None:
    """Check, before anything is exported, that the hub can have a repository of this name.

    Raises:
        UsageError: It cannot.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(
            f"the hub has no repositories of such a name: {error}", where=f"--push {name}", hint="write ORG/NAME"
        ) from error


def push(folder: Path, repository: str, public: bool, on_event: EventHandler) -> str | None:
    """Upload a folder to a repository of the hub, which is created if it does not exist.

    A failure is a warning, not an error, because the export itself is complete on disk.

    Args:
        folder: The folder, with a model card.
        repository: `name` or `org/name`.
        public: Whether a new repository is public.
        on_event: Receives the phase of the upload.

    Returns:
        The repository's address; None if the upload failed.
    """
    on_event(Phase(f"uploading {folder.name} to {repository}"))
    try:
        api = HfApi()
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="From ft")
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        logger.warning(
            "%s was not uploaded to the hub: %s; its files are in %s: check HF_TOKEN and the network, and try again",
            repository,
            str(error).splitlines()[0] if str(error) else type(error).__name__,
            folder,
        )
        return None
    return str(address)

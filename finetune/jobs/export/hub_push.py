"""`--push`: a folder that was made of a run, sent to the hub."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from finetune.run.events import EventHandler, Phase

logger = logging.getLogger(__name__)


def push(folder: Path, repository: str, public: bool, on_event: EventHandler) -> str | None:
    """Send a folder to a repository of the hub, which is made if it is not there.

    What was made stays on the disk whatever happens here, so that a failure is a warning and no error.

    Args:
        folder: With a model card.
        repository: `name` or `org/name`.
        public: Whether a repository that is made here can be seen by everybody.
        on_event: Told that it is sent.

    Returns:
        The repository's address; None where it could not be sent.
    """
    on_event(Phase(f"sending {folder.name} to {repository}"))
    try:
        api = HfApi()
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="From ft")
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        logger.warning(
            "%s is not on the hub: %s; it is still in %s: check HF_TOKEN and the network, and send it again",
            repository,
            str(error).splitlines()[0] if str(error) else type(error).__name__,
            folder,
        )
        return None
    return str(address)

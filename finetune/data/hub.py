"""Rows of a data set on the hub, through `datasets`, which reads data files and runs no code of a repository."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from finetune.data.rows import Row, excerpt
from finetune.errors import DataError, EnvironmentFault
from finetune.recipe.sections.data import Hub


def read_hub(hub: Hub) -> Iterator[Row]:
    """The rows of one split of a hub data set, in order.

    Raises:
        DataError: The hub has no such data set, subset, split or revision, or a file of it is damaged.
        EnvironmentFault: The hub cannot be reached and the data set is not in the local cache.
    """
    import datasets  # here: it takes seconds, and most recipes name files

    from finetune.data.readers.arrow_values import ROWS_PER_BATCH, JsonRows, numbered_rows

    where = _place(hub)
    with _as_data_errors(where):
        found = datasets.load_dataset(
            hub.name, hub.subset, split=hub.split, revision=hub.revision, streaming=hub.stream
        )
        # Tables instead of rows: their schema has the features, and no image or sound in them is decoded.
        tables = iter(found.with_format("arrow").iter(ROWS_PER_BATCH))
    values = (
        row for table in tables for batch in table.to_batches() for row in JsonRows(table.schema, where).of(batch)
    )
    yield from numbered_rows(values, lambda: _as_data_errors(where), f"{where} row ")


def revision_of(hub: Hub) -> str | None:
    """The commit of the data set that is read; offline, that of the newest copy in the local cache.

    Offline the library reads that copy whatever revision is requested, so the result may differ from `hub.revision`.
    None where the library reports no commit.

    Raises:
        DataError: The hub has no such data set, subset or revision.
        EnvironmentFault: The hub cannot be reached and the data set is not in the local cache.
    """
    import datasets

    with _as_data_errors(_place(hub)):
        commit: str | None = datasets.load_dataset_builder(hub.name, hub.subset, revision=hub.revision).hash
    return commit


def _place(hub: Hub) -> str:
    """Short name of the data set; refuses a local folder with this name, which the library would read instead."""
    where = f"{hub.name}[{hub.split}]"
    if os.path.exists(hub.name):
        raise DataError("a local folder has the name of the hub data set", where=where, hint="set path to read it")
    return where


@contextmanager
def _as_data_errors(where: str) -> Iterator[None]:
    """Raise errors of the library as DataError or EnvironmentFault."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError
    from pyarrow import ArrowException

    try:
        yield
    except DatasetNotFoundError as error:
        raise DataError(
            f"the hub has no such data set, or you have no access: {excerpt(str(error))}",
            where=where,
            hint="check the spelling and the revision; for a gated or private data set set HF_TOKEN",
        ) from error
    except (DatasetsError, ArrowException, ValueError, TypeError) as error:
        raise DataError(
            f"the data set cannot be read: {excerpt(str(error))}", where=where, hint="check its subset and split"
        ) from error
    except (HfHubHTTPError, OSError) as error:  # ConnectionError and offline mode are OSErrors
        raise EnvironmentFault(
            f"the data set is not in the local cache and the hub cannot be reached ({type(error).__name__})",
            where=where,
            hint="check the network and HF_HUB_OFFLINE, or download the files and set path",
        ) from error

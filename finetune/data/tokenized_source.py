"""Tokenized sources: a source of a recipe as a token store, from the cache where it has an entry."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

import finetune.data
import finetune.recipe.sections
from finetune.data.chat_template import ChatTemplate
from finetune.data.hub import revision_of
from finetune.data.mixing import sampled
from finetune.data.rows import Row
from finetune.data.sources import files_of, read_rows
from finetune.data.token_store import TokenStore, TokenStoreWriter
from finetune.data.tokenize import NumberedRow, tokenize
from finetune.errors import DataError
from finetune.formatting import counted
from finetune.recipe.sections.data import Data, Hub, SourceSection
from finetune.run.events import EventHandler, Progress
from finetune.run.provenance import file_record
from finetune.storage.cache import cached, sources_digest
from finetune.storage.opening import HashedFile

SHAPING_OPTIONS = ("max_length", "overlength", "train_on", "split_turns", "control_tokens")
"""Keys of the section `data` on which the tokens and target masks of a row depend."""

SHAPING_PACKAGES = ("transformers", "tokenizers", "jinja2", "datasets")


@dataclass(frozen=True)
class TokenizedSource:
    """One source of a recipe.

    Attributes:
        section: Section of the source.
        seed: Seed of its samples.
        content: Identity of the data: name, size and sha256 of each file, or name and commit on the hub.
        files: The files with their hashes; none for a data set of the hub.
        store: The tokenized rows.
    """

    section: SourceSection
    seed: int
    content: list[dict[str, Any]]
    files: list[HashedFile]
    store: TokenStore

    @classmethod
    def of(
        cls, source: SourceSection, section: Data, tokenizer: PreTrainedTokenizerBase, seed: int, on_event: EventHandler
    ) -> TokenizedSource:
        """Tokenize a source, or open its entry in the cache.

        Raises:
            DataError: A file or row cannot be used, or a file changed while it was read.
            EnvironmentFault: The cache cannot be written.
        """
        files = [] if source.hub else [_hashed(file) for file in files_of(source)]
        content = [_hub_record(source.hub)] if source.hub else list(map(file_record, files))

        def make(folder: Path) -> None:
            phase = f"tokenizing {source.place}"
            with TokenStoreWriter(folder) as writer:
                rows = numbered_rows(source, seed)
                tokenize(
                    rows, source, section, tokenizer, writer, lambda done: on_event(Progress(phase, done, total=None))
                )
            # The entry's key is the hash of the files. Rows of any other content must not be found under it.
            for file in files:
                if not file.is_unchanged:
                    raise _changed(file)

        key = _key(source, section, tokenizer, seed, content)
        return cls(source, seed, content, files, TokenStore(cached("tokens", key, make)))

    def rows_at(self, indices: Iterable[int]) -> Iterator[Row]:
        """The rows at ascending indices, read again from the files that were tokenized.

        Raises:
            DataError: A file has changed since.
        """
        self._refuse_changed_files()
        yield from rows_at(self.section, indices)
        self._refuse_changed_files()

    def _refuse_changed_files(self) -> None:
        for file in self.files:
            if not file.has_same_state:
                raise _changed(file)


def numbered_rows(source: SourceSection, seed: int) -> Iterator[NumberedRow]:
    """The rows that a recipe takes from a source, each with its index in the source.

    With `rows` or `max_rows`, a uniform sample is taken. It needs the number of rows, so the source is read twice: once
    to count, once for the sample. From a stream, which may be too long to count, the first rows are taken.

    Raises:
        DataError: A row cannot be read, or the source has fewer rows than requested.
    """
    wanted = source.rows or source.max_rows
    if wanted is None:
        yield from enumerate(read_rows(source))
        return
    if source.hub and source.hub.stream:
        count = 0
        for number, row in enumerate(islice(read_rows(source), wanted)):
            yield number, row
            count = number + 1
    else:
        count = sum(1 for _ in read_rows(source))
        sample = sampled(count, wanted, seed).tolist()
        yield from zip(sample, rows_at(source, sample), strict=True)
    if source.rows is not None and count < source.rows:
        raise DataError(
            f"the source has {counted(count, 'row')}, fewer than rows: {source.rows}",
            where=source.place,
            hint="lower it, or remove it to take every row",
        )


def rows_at(source: SourceSection, indices: Iterable[int]) -> Iterator[Row]:
    """The rows of a source at ascending indices, in one pass over it."""
    rows = enumerate(read_rows(source))
    for wanted in indices:
        yield next(row for index, row in rows if index == wanted)


def _hashed(path: Path) -> HashedFile:
    try:
        return HashedFile.read(path)
    except OSError as error:
        raise DataError(
            f"the file cannot be read: {error.strerror}", where=str(path), hint="check the source's path in the recipe"
        ) from error


def _changed(file: HashedFile) -> DataError:
    return DataError(
        "the file changed while it was read",
        where=str(file.path),
        hint="run the command again once the program that writes the file is done",
    )


def _key(
    source: SourceSection,
    section: Data,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    content: list[dict[str, Any]],
) -> str:
    """Cache key: a hash of everything the tokens depend on: data, tokenizer, template, options, versions and code."""
    parts = {
        "content": content,
        "source": source.model_dump(exclude={"weight"}),
        "options": section.model_dump(include=set(SHAPING_OPTIONS)),
        "seed": seed if source.rows or source.max_rows else None,
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special_tokens": tokenizer.special_tokens_map,
        "named_tokens": sorted(getattr(tokenizer, "named_tokens", ())),
        "template": tokenizer.chat_template,
        "today": str(getattr(tokenizer, "today", None)) if ChatTemplate(tokenizer).mentions("strftime_now") else None,
        "packages": {name: version(name) for name in SHAPING_PACKAGES},
        # A fixed bug in masks must not return from the cache; the store has a section, which new code must accept.
        "code": sources_digest(finetune.data, finetune.recipe.sections),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _hub_record(hub: Hub) -> dict[str, Any]:
    """Identity of a hub data set: name, split and commit.

    Raises:
        DataError: The recipe pins a commit, and the machine is offline with another commit in the local cache.
    """
    revision = revision_of(hub)
    pinned = hub.revision is not None and re.fullmatch(r"[0-9a-f]{40}", hub.revision)
    if pinned and revision not in (None, hub.revision):
        raise DataError(
            f"the local cache holds commit {revision}, not {hub.revision}",
            where=f"{hub.name}[{hub.split}]",
            hint="download the pinned commit once while online, or change the revision",
        )
    record = {"hub": hub.name, "subset": hub.subset, "split": hub.split, "commit": revision}
    # Without a commit, changes cannot be detected: the process id makes an entry that no other run finds.
    return record if revision else {**record, "process": os.getpid()}

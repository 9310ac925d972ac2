"""A source of a recipe as a store of tokenized rows, from the cache where it is there already."""

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
from finetune.data.hub import revision_of
from finetune.data.mixing import sampled
from finetune.data.rows import Row
from finetune.data.sources import files_of, read_rows
from finetune.data.token_store import TokenStore, TokenStoreWriter
from finetune.data.tokenize import NumberedRow, tokenize
from finetune.errors import DataError
from finetune.recipe.sections.data import Data, Hub, SourceSection
from finetune.run.events import EventHandler, Progress
from finetune.run.provenance import file_record
from finetune.storage.cache import cached, sources_digest

SHAPING_OPTIONS = ("max_length", "overlength", "train_on", "split_turns")
"""Keys of the section `data` that decide which tokens a row becomes and which of them are trained."""

SHAPING_PACKAGES = ("transformers", "tokenizers", "jinja2", "datasets")


@dataclass(frozen=True)
class TokenizedSource:
    """One source of a recipe.

    Attributes:
        section: Its section.
        seed: Of its draws.
        content: What was read: name, size and sha256 of each file, or the hub's name and commit.
        store: Its rows.
    """

    section: SourceSection
    seed: int
    content: list[dict[str, Any]]
    store: TokenStore

    @classmethod
    def of(
        cls, source: SourceSection, section: Data, tokenizer: PreTrainedTokenizerBase, seed: int, on_event: EventHandler
    ) -> TokenizedSource:
        """Tokenize a source, or find it tokenized.

        Raises:
            DataError: A file or row cannot be used.
            EnvironmentFault: The cache cannot be written.
        """
        content = [_hub_record(source.hub)] if source.hub else [file_record(file) for file in files_of(source)]

        def make(folder: Path) -> None:
            doing = f"tokenizing {source.place}"
            with TokenStoreWriter(folder) as writer:
                rows = numbered_rows(source, seed)
                tokenize(
                    rows, source, section, tokenizer, writer, lambda done: on_event(Progress(doing, done, total=None))
                )

        key = _key(source, section, tokenizer, seed, content)
        return cls(source, seed, content, TokenStore(cached("tokens", key, make)))


def numbered_rows(source: SourceSection, seed: int) -> Iterator[NumberedRow]:
    """The rows that a recipe takes of a source, each with its number in the source.

    Where `rows` asks for a part, the source is read twice: once to count, for every row must be as likely to be
    sampled. Of a stream, which may be far larger than the part, the first ones are taken.

    Raises:
        DataError: A row cannot be read, or there are fewer than asked for.
    """
    if source.rows is None:
        yield from enumerate(read_rows(source))
        return
    if source.hub and source.hub.stream:
        count = 0
        for number, row in enumerate(islice(read_rows(source), source.rows)):
            yield number, row
            count = number + 1
    else:
        count = sum(1 for _ in read_rows(source))
        chosen = sampled(count, source.rows, seed).tolist()
        yield from zip(chosen, rows_at(source, chosen), strict=True)
    if count < source.rows:
        raise DataError(
            f"the source has {count} rows, fewer than rows: {source.rows}",
            where=source.place,
            hint="lower it, or leave it out to take every row",
        )


def rows_at(source: SourceSection, numbers: Iterable[int]) -> Iterator[Row]:
    """The rows of a source with these numbers, which ascend."""
    rows = enumerate(read_rows(source))
    for wanted in numbers:
        yield next(row for number, row in rows if number == wanted)


def _key(
    source: SourceSection,
    section: Data,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    content: list[dict[str, Any]],
) -> str:
    """A name that differs where the tokens could: by bytes, tokenizer, template, options, and the code itself."""
    parts = {
        "content": content,
        "source": source.model_dump(exclude={"weight"}),
        "options": section.model_dump(include=set(SHAPING_OPTIONS)),
        "seed": seed if source.rows else None,
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special_tokens": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
        "packages": {name: version(name) for name in SHAPING_PACKAGES},
        "code": sources_digest(finetune.data),  # a corrected mask must not be hidden by what the wrong one left
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _hub_record(hub: Hub) -> dict[str, Any]:
    """What tells a hub data set from another, and from itself at another time: its commit.

    Raises:
        DataError: The recipe pins a commit, and the local cache, all there is without a network, holds another.
    """
    revision = revision_of(hub)
    pinned = hub.revision is not None and re.fullmatch(r"[0-9a-f]{40}", hub.revision)
    if pinned and revision not in (None, hub.revision):
        raise DataError(
            f"the local cache holds commit {revision}, not {hub.revision}",
            where=f"{hub.name}[{hub.split}]",
            hint="fetch the pinned commit once with a network, or change the revision",
        )
    record = {"hub": hub.name, "subset": hub.subset, "split": hub.split, "commit": revision}
    # Where nothing tells whether it has changed, the tokens must not be found again.
    return record if revision else {**record, "process": os.getpid()}

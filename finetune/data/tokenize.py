"""A source's rows tokenized into a store: on all cores, in order, a few chunks in memory at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune.data.documents import Format
from finetune.data.encode import Encoder
from finetune.data.rows import Row
from finetune.data.token_store import Encoded, TokenStoreWriter
from finetune.data.truncation import Truncation
from finetune.errors import EnvironmentFault
from finetune.recipe.sections.data import Data, SourceSection
from finetune.resolve import build

CHUNK_ROWS = 256
"""Rows that a process is handed at a time."""

ROWS_WORTH_PROCESSES = 8192
"""Rows below which starting processes takes longer than the work itself."""

NumberedRow = tuple[int, Row]


@dataclass(frozen=True)
class Tokenizing:
    """All that it takes to tokenize rows of one source; can be sent to another process.

    Attributes:
        source: Their format.
        section: What is trained, and what is done with long rows.
        tokenizer: Of the model.
        first: The source's first row, which tells the format where the recipe leaves it open.
    """

    source: SourceSection
    section: Data
    tokenizer: PreTrainedTokenizerBase
    first: Row

    def format(self) -> Format[Any]:
        """The format of the rows."""
        made: Format[Any] = build(self.source)
        made.document(self.first)
        return made

    def encoder(self) -> Callable[[list[NumberedRow]], Encoded]:
        """A function from rows to tokens, with what it needs built once."""
        row_format = self.format()
        encoder = Encoder(self.tokenizer, self.section.train_on)

        def encode(rows: list[NumberedRow]) -> Encoded:
            fitting = Truncation(encoder, self.section)
            for number, row in rows:
                fitting.add(row_format.document(row), number, row.where)
            return fitting.encoded()

        return encode


def tokenize(
    rows: Iterable[NumberedRow],
    source: SourceSection,
    section: Data,
    tokenizer: PreTrainedTokenizerBase,
    writer: TokenStoreWriter,
    report_rows: Callable[[int], None],
) -> None:
    """Tokenize `rows` into a store.

    The first rows are tokenized here, so that what is wrong with all of them shows at once; if many follow, on
    `section.workers` processes.

    Raises:
        DataError: A row cannot be used; the first one in order is named.
        EnvironmentFault: A process was killed.
    """
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return
    tokenizing = Tokenizing(source, section, tokenizer, first[1])
    writer.format = tokenizing.format().name
    chunks = _chunks(chain([first], rows))
    encode = tokenizing.encoder()
    workers = section.workers or _cores()
    here = None if workers == 1 else ROWS_WORTH_PROCESSES // CHUNK_ROWS
    for chunk in islice(chunks, here):
        _write(encode(chunk), writer, report_rows)
    next_chunk = next(chunks, None)
    if next_chunk is not None:
        for encoded in _in_processes(tokenizing, chain([next_chunk], chunks), workers):
            _write(encoded, writer, report_rows)


def _write(encoded: Encoded, writer: TokenStoreWriter, report_rows: Callable[[int], None]) -> None:
    writer.add(encoded)
    report_rows(writer.counts.read)


def _chunks(rows: Iterator[NumberedRow]) -> Iterator[list[NumberedRow]]:
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield chunk


def _in_processes(tokenizing: Tokenizing, chunks: Iterator[list[NumberedRow]], workers: int) -> Iterator[Encoded]:
    """The chunks' results in their order; no more than two chunks a process are under way."""
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if has_server else "spawn")
    if has_server:  # its children share the memory of what it has imported
        context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(tokenizing,)) as pool:
        under_way: deque[Future[Encoded]] = deque()
        try:
            for chunk in chunks:
                under_way.append(pool.submit(_encode, chunk))
                if len(under_way) >= 2 * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool as error:
            raise EnvironmentFault(
                "a process that tokenized rows was killed, most likely for want of memory",
                hint="set data.workers to a lower number",
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_encode_here: Callable[[list[NumberedRow]], Encoded]


def _start(tokenizing: Tokenizing) -> None:
    """Make a new process ready; Ctrl-C, which a terminal sends to it too, is for its parent to act on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    global _encode_here
    _encode_here = tokenizing.encoder()


def _encode(rows: list[NumberedRow]) -> Encoded:
    return _encode_here(rows)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

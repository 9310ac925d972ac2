"""Tokenization of a source into a token store: on all cores, in order, with few chunks in memory at a time."""

from __future__ import annotations

import logging
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

from finetune.data.bad_rows import bad_rows_error
from finetune.data.documents import Format
from finetune.data.encode import Encoder
from finetune.data.encoding_report import EncodingReport
from finetune.data.formats.auto import with_fitting_format
from finetune.data.rows import Row
from finetune.data.token_store import EncodedRows, TokenStoreWriter
from finetune.data.truncation import Truncation
from finetune.errors import DataError, EnvironmentFault
from finetune.recipe.sections.data import AutoSource, Data, SourceSection
from finetune.resolve import build

logger = logging.getLogger(__name__)

CHUNK_ROWS = 256
"""Rows sent to a process at a time."""

ROWS_WORTH_PROCESSES = 8192
"""Number of rows below which starting processes takes longer than tokenizing."""

MOST_BAD_ROWS = 1000
"""Number of bad rows after which no more are counted before the error, where the recipe does not drop them."""

NumberedRow = tuple[int, Row]


@dataclass(frozen=True)
class TokenizationSpec:
    """Everything needed to tokenize rows of one source; picklable, for other processes.

    Attributes:
        source: Section of the source, with its format.
        section: Target tokens and the policy for long rows.
        tokenizer: Tokenizer of the model.
        first: The first row of the source, from which `format: auto` detects the format.
    """

    source: SourceSection
    section: Data
    tokenizer: PreTrainedTokenizerBase
    first: Row

    def format(self) -> Format[Any]:
        """The format of the rows."""
        row_format: Format[Any] = build(self.source)
        # `auto` detects the format on the first row it is given. Every process gives it the same one, whatever
        # chunk it works on, so that all of them read the rows alike.
        try:
            row_format.document(self.first)
        except DataError:
            if row_format.resolved is self.source and isinstance(self.source, AutoSource):
                raise  # no format was detected; other errors are counted when the row is encoded
        return row_format

    def encoder(self) -> Callable[[list[NumberedRow]], EncodedRows]:
        """A function that tokenizes chunks of rows; format and encoder are built once."""
        row_format = self.format()
        encoder = Encoder(self.tokenizer, self.section.train_on, self.section.control_tokens)

        def encode(rows: list[NumberedRow]) -> EncodedRows:
            encoder.report = EncodingReport()
            truncation = Truncation(encoder, self.section)
            for number, row in rows:
                try:
                    document = row_format.document(row)
                except DataError as error:
                    truncation.add_bad(with_fitting_format(error, row, self.source), row.where)
                    continue
                for column in sorted(row_format.unread_columns(row)):
                    encoder.report.note(f"column {column!r} is not read", row.where)
                truncation.add(document, number, row.where)
            return truncation.encoded()

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

    The first rows are tokenized in this process, so that an error that all rows have is raised at once; the rest, if
    there are many, by `section.workers` processes.

    Raises:
        DataError: A row cannot be used; the error names the first one in order.
        EnvironmentFault: A process was killed.
    """
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return
    specification = TokenizationSpec(source, section, tokenizer, first[1])
    writer.section = specification.format().resolved
    chunks = _chunks(chain([first], rows))
    encode = specification.encoder()
    workers = section.workers or _cores()
    chunks_here = None if workers == 1 else ROWS_WORTH_PROCESSES // CHUNK_ROWS
    for chunk in islice(chunks, chunks_here):
        _write(encode(chunk), writer, section, report_rows)
    next_chunk = next(chunks, None)
    if next_chunk is not None:
        for encoded in _encoded(specification, encode, chain([next_chunk], chunks), workers):
            _write(encoded, writer, section, report_rows)


def _write(encoded: EncodedRows, writer: TokenStoreWriter, section: Data, report_rows: Callable[[int], None]) -> None:
    writer.add(encoded)
    report_rows(writer.counts.read)
    if section.on_bad_row == "error" and writer.counts.bad.total() > MOST_BAD_ROWS:
        raise bad_rows_error(writer.counts.bad, writer.bad, may_drop=True)


def _chunks(rows: Iterator[NumberedRow]) -> Iterator[list[NumberedRow]]:
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield chunk


def _encoded(
    specification: TokenizationSpec,
    encode: Callable[[list[NumberedRow]], EncodedRows],
    chunks: Iterator[list[NumberedRow]],
    workers: int,
) -> Iterator[EncodedRows]:
    """The results of the chunks, in order: from `workers` processes, or from this one where they cannot be started."""
    try:
        pool = _started_pool(specification, workers)
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        logger.info(
            "the rows are tokenized in one process, which takes longer: several cannot be started (%s); they need free "
            "space in a writable /dev/shm (docker run --shm-size=64m). data.workers: 1 does the same without this note",
            reason,
        )
        return map(encode, chunks)
    return _in_processes(pool, chunks, workers)


def _started_pool(specification: TokenizationSpec, workers: int) -> ProcessPoolExecutor:
    """A pool of processes with its first one.

    Raises:
        OSError: The machine has no shared memory for the locks of the pool, or no folder for its sockets.
        NotImplementedError: The machine has no semaphores.
    """
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if has_server else "spawn")
    # Not fork: the parent has threads (torch, tokenizers), and a lock that one of them holds would never be released.
    # Children of the fork server share the memory of the modules that it has imported.
    if has_server:
        context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(specification,))
    try:
        pool.submit(os.getpid)  # starts a process, and the server of the others
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    return pool


def _in_processes(
    pool: ProcessPoolExecutor, chunks: Iterator[list[NumberedRow]], workers: int
) -> Iterator[EncodedRows]:
    """The results of the chunks, in order; at most two chunks a process are pending, which bounds the memory."""
    with pool:
        pending: deque[Future[EncodedRows]] = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(_encode, chunk))
                if len(pending) >= 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise EnvironmentFault(
                "a process that tokenized rows was killed, most likely because memory ran out",
                hint="set data.workers to a lower number",
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_encode_here: Callable[[list[NumberedRow]], EncodedRows]


def _start(specification: TokenizationSpec) -> None:
    """Initialize a worker process."""
    # A terminal sends Ctrl-C to all processes of its group; the parent alone handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    global _encode_here
    _encode_here = specification.encoder()


def _encode(rows: list[NumberedRow]) -> EncodedRows:
    return _encode_here(rows)


def _cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

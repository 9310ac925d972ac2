"""Tokenized sources: the same on one process and several; cache hits only where tokens cannot differ."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from finetune.data import tokenize as tokenize_module
from finetune.data import tokenized_source
from finetune.data.bad_rows import MALFORMED
from finetune.data.dataset import read_data
from finetune.data.encode import Encoder
from finetune.data.formats.chat import ChatFormat
from finetune.data.rows import Row
from finetune.data.token_store import TokenStore
from finetune.data.tokenized_source import TokenizedSource
from finetune.errors import DataError, ModelError
from finetune.recipe.sections.data import Data
from finetune.run.events import Event, Progress
from tests.fixtures.tiny import chat_rows, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def chats(folder: Path, count: int = 6, change: Callable[[int, dict[str, Any]], Any] | None = None) -> Path:
    rows = chat_rows(count)
    for number, row in enumerate(rows):
        if change:
            change(number, row)
    file = folder / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def tokenized(
    file: Path, tokenizer: PreTrainedTokenizerBase = TOKENIZER, seed: int = 1, source: Any = None, **settings: Any
) -> tuple[TokenStore, bool]:
    """The store, and whether it was made by this call."""
    events: list[Event] = []
    train = [{"path": str(file), "format": "chat", **(source or {})}]
    section = Data.model_validate({"train": train, "max_dropped": 1, **settings})
    made = TokenizedSource.of(section.train[0], section, tokenizer, seed, events.append)
    return made.store, any(isinstance(event, Progress) for event in events)


def columns(store: TokenStore) -> list[Any]:
    places = [store.place(number) for number in range(len(store))]
    return [list(store), places, store.rows.tolist(), store.targets.tolist(), store.digests.tolist(), store.counts]


def test_token_store_returns_encoded_examples_with_places(tmp_path: Path):
    file = chats(tmp_path)
    store, _ = tokenized(file)
    rows = [Row(json.loads(line), "row") for line in file.read_text().splitlines()]
    section = Data.model_validate({"train": [{"path": str(file), "format": "chat"}]})
    documents = [ChatFormat(section.train[0]).document(row) for row in rows]
    assert list(store) == [Encoder(TOKENIZER, "assistant").examples(document, "row")[0] for document in documents]
    assert [store.place(number) for number in range(6)] == [f"{file}:{line}" for line in range(1, 7)]
    assert store.targets.tolist() == [example.targets for example in store]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize_module, "CHUNK_ROWS", 4)
    monkeypatch.setattr(tokenize_module, "ROWS_WORTH_PROCESSES", 4)


@pytest.mark.usefixtures("small_chunks")
def test_tokenization_on_two_processes_equals_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = chats(tmp_path, count=21)
    alone, _ = tokenized(file, workers=1)
    expected = columns(alone)
    monkeypatch.setenv("FT_CACHE", str(tmp_path / "another"))
    parallel, made = tokenized(file, workers=2)
    assert made
    assert columns(parallel) == expected


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "error",
    [OSError(number, os.strerror(number)) for number in (errno.ENOSPC, errno.EROFS, errno.ENOENT, errno.EACCES)]
    + [NotImplementedError("this platform has no semaphores")],
    ids=str,
)
@pytest.mark.parametrize("place", ["_multiprocessing.SemLock", "multiprocessing.forkserver.connect_to_new_process"])
def test_tokenization_where_processes_cannot_start_equals_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, place: str
):
    def fail(*arguments: Any, **named: Any) -> Any:
        raise error

    file = chats(tmp_path, count=21)
    alone, _ = tokenized(file, workers=1)
    expected = columns(alone)
    monkeypatch.setenv("FT_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(place, fail)
    with caplog.at_level("INFO", logger="finetune"):
        found, made = tokenized(file, workers=2)
    assert made
    assert columns(found) == expected
    assert caplog.text.count("/dev/shm") == 1
    assert "data.workers" in caplog.text
    assert (getattr(error, "strerror", None) or str(error)) in caplog.text


@pytest.mark.usefixtures("small_chunks")
def test_malformed_rows_are_counted_with_place_of_the_first(tmp_path: Path):
    def break_row(number: int, row: dict[str, Any]) -> None:
        if number in (13, 17):
            row["messages"] = "nothing"

    store, _ = tokenized(chats(tmp_path, 21, break_row), workers=2, on_bad_row="drop")
    assert (store.counts.kept, store.counts.bad) == (19, {MALFORMED: 2})
    malformed = store.bad[MALFORMED]
    assert [place.rpartition("/")[2] for place in malformed.places] == ["chat.jsonl:14", "chat.jsonl:18"]
    assert "messages" in malformed.what
    assert malformed.hint


@pytest.mark.usefixtures("small_chunks")
def test_tokenization_stops_at_many_bad_rows_and_keeps_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def break_row(number: int, row: dict[str, Any]) -> None:
        row["messages"] = number

    monkeypatch.setattr(tokenize_module, "MOST_BAD_ROWS", 7)
    with pytest.raises(DataError, match="messages") as caught:
        tokenized(chats(tmp_path, 21, break_row))
    assert str(caught.value.where).endswith("chat.jsonl:1")
    assert list((tmp_path / "cache" / "tokens").glob("[!.]*")) == []


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("workers", [1, 2])
def test_hostile_template_raises_with_place_of_row(tmp_path: Path, workers: int):
    def mark(number: int, row: dict[str, Any]) -> None:
        if number == 13:
            row["messages"][0]["content"] = "now"

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].content == 'now' %}{{ 'a' * 9000000000 }}{% endif %}" + tokenizer.chat_template
    )
    with pytest.raises(ModelError, match="template needs more than") as caught:
        tokenized(chats(tmp_path, 21, mark), tokenizer=tokenizer, workers=workers)
    assert str(caught.value.where).endswith("chat.jsonl:14")
    assert caught.value.hint


def another_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["hello"])
    return tokenizer


def another_template() -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    assert isinstance(tokenizer.chat_template, str)
    tokenizer.chat_template = tokenizer.chat_template + "{# another #}"
    return tokenizer


@pytest.mark.parametrize(
    "changed",
    [
        {"tokenizer": another_tokenizer()},
        {"tokenizer": another_template()},
        {"max_length": 1000},
        {"overlength": "drop"},
        {"train_on": "all"},
        {"split_turns": True},
        {"source": {"tools": "functions"}},
        {"source": {"rows": 5}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_cache_misses_when_tokens_could_change(tmp_path: Path, changed: dict[str, Any]):
    file = chats(tmp_path)
    assert tokenized(file)[1]
    assert tokenized(file, **changed)[1]
    assert not tokenized(file)[1]


def test_cache_misses_on_changed_bytes_with_same_size_and_time(tmp_path: Path):
    file = chats(tmp_path)
    before, _ = tokenized(file)
    seen = file.stat()

    def shout(number: int, row: dict[str, Any]) -> None:
        row["messages"][0]["content"] = row["messages"][0]["content"].upper()

    chats(tmp_path, change=shout)
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert file.stat().st_size == seen.st_size
    after, made = tokenized(file)
    assert made
    assert list(after) != list(before)


@pytest.mark.parametrize(
    "changed",
    [{"seed": 9}, {"workers": 3}, {"max_dropped": 0.5}, {"on_bad_row": "drop"}, {"source": {"weight": 2}}],
    ids=str,
)
def test_cache_hits_when_tokens_cannot_change(tmp_path: Path, changed: dict[str, Any]):
    file = chats(tmp_path)
    assert tokenized(file)[1]
    assert not tokenized(file, **changed)[1]


def test_rows_option_samples_subset_by_seed(tmp_path: Path):
    file = chats(tmp_path, count=12)
    whole, _ = tokenized(file)
    draws = [tokenized(file, source={"rows": 3}, seed=seed)[0].rows.tolist() for seed in range(8)]
    assert len(set(map(tuple, draws))) > 1
    assert all(rows == sorted(set(rows)) and len(rows) == 3 for rows in draws)
    part, _ = tokenized(file, source={"rows": 3}, seed=0)
    assert list(part) == [whole[row] for row in draws[0]]


def test_pinned_commit_missing_in_local_cache_raises(monkeypatch: pytest.MonkeyPatch):
    pinned, held = "a" * 40, "b" * 40
    monkeypatch.setattr("finetune.data.tokenized_source.revision_of", lambda hub: held)
    section = Data.model_validate({"train": [{"hub": {"name": "org/name", "revision": pinned}, "format": "chat"}]})
    with pytest.raises(DataError, match=f"holds commit {held}, not {pinned}"):
        TokenizedSource.of(section.train[0], section, TOKENIZER, 1, lambda event: None)


@pytest.mark.parametrize("again", [False, True], ids=["made", "found"])
def test_warnings_are_logged_on_cache_miss_and_hit(tmp_path: Path, caplog: pytest.LogCaptureFixture, again: bool):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    file = chats(tmp_path)
    section = Data.model_validate({"train": [{"path": str(file)}]})
    for _ in range(1 + again):
        caplog.clear()
        rows = read_data(section, tokenizer, seed=1)
    assert caplog.text.count("without a control token") == 1
    assert rows.train.sources[0].store.format == "chat"


def written_again(file: Path) -> None:
    file.write_text(file.read_text().replace("a", "e"))


def written_and_restored(file: Path) -> None:
    before = file.read_bytes()
    written_again(file)
    file.write_bytes(before)


def grown(file: Path) -> None:
    with file.open("a") as rows:
        rows.write(json.dumps(chat_rows(1)[0]) + "\n")


def replaced(file: Path) -> None:
    aside = file.with_suffix(".new")
    aside.write_text(file.read_text().replace("a", "e"))
    aside.replace(file)


@pytest.mark.parametrize("change", [written_again, written_and_restored, grown, replaced, Path.unlink])
def test_file_that_changes_while_it_is_tokenized_is_refused_and_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], Any]
):
    file = chats(tmp_path)
    content, read_rows = file.read_bytes(), tokenized_source.read_rows

    def changing(section: Any) -> Any:
        for number, row in enumerate(read_rows(section)):
            if number == 3:
                change(file)
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(tokenized_source, "read_rows", changing)
        with pytest.raises(DataError, match="changed while it was read") as refusal:
            tokenized(file)
    assert refusal.value.where == str(file)
    file.write_bytes(content)
    store, made = tokenized(file)
    assert made
    assert [store.place(number) for number in range(len(store))] == [f"{file}:{line}" for line in range(1, 7)]


def test_rows_of_a_file_that_changed_since_are_refused(tmp_path: Path):
    file = chats(tmp_path)
    section = Data.model_validate({"train": [{"path": str(file), "format": "chat"}]})
    data = read_data(section, TOKENIZER, seed=1)
    assert len(list(data.train.documents())) == 6
    grown(file)
    with pytest.raises(DataError, match="changed while it was read"):
        next(data.train.documents())

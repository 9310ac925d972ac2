"""Rows made to fit: what must not be lost is kept, and what is lost is counted."""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from finetune.data.dataset import TokenizedDataset, refuse_losses
from finetune.data.documents import Conversation, Document, Message, PlainText
from finetune.data.encode import Encoder, Example
from finetune.data.lengths import chunks, without_prompt_head
from finetune.data.token_store import TokenStore, TokenStoreWriter
from finetune.data.tokenized_source import TokenizedSource
from finetune.data.truncation import Truncation
from finetune.errors import DataError
from finetune.recipe.sections.data import Data
from tests.fixtures.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TALK = Conversation((Message("user", "a" * 40), Message("assistant", "b" * 10)))
LONG_ANSWER = Conversation((Message("user", "a"), Message("assistant", "b" * 60)))


def encoded(*documents: Document, **settings: object) -> TokenizedDataset:
    section = Data.model_validate({"train": [{"path": "rows.jsonl"}], "max_dropped": 1, **settings})
    fitting = Truncation(Encoder(TOKENIZER, section.train_on), section)
    for line, document in enumerate(documents, start=1):
        fitting.add(document, line - 1, f"rows.jsonl:{line}")
    with TemporaryDirectory() as folder:
        with TokenStoreWriter(Path(folder)) as writer:
            writer.add(fitting.encoded())
        split = TokenizedDataset.whole([TokenizedSource(section.train[0], 0, [], TokenStore(Path(folder)))])
    refuse_losses(split, section)
    return split


def trained(example: Example) -> str:
    return TOKENIZER.decode([i for i, target in zip(example.ids, example.is_target, strict=True) if target])


def test_a_prompt_is_cut_from_the_left_behind_the_beginning_of_text_and_no_target_with_it():
    split = encoded(TALK, max_length=40, overlength="truncate_prompt")
    (example,) = split
    assert len(example.ids) == 40
    assert example.ids[0] == TOKENIZER.bos_token_id
    assert trained(example) == "b" * 10 + "<|end|>"
    assert (split.counts.truncated, split.counts.cut_target_tokens) == (1, 0)


@pytest.mark.parametrize(("longest", "fits"), [(4, True), (3, False)])
def test_a_prompt_keeps_at_least_one_token(longest: int, fits: bool):
    example = Example([0, 1, 2, 3, 4], [False, False, True, True, True])
    assert (without_prompt_head(example, longest, 0) is not None) == fits


def test_an_answer_that_leaves_no_room_stops_the_run():
    with pytest.raises(DataError, match="no room for a prompt"):
        encoded(LONG_ANSWER, max_length=40, overlength="truncate_prompt")


def test_a_cut_end_is_counted_in_trained_tokens(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        split = encoded(LONG_ANSWER, max_length=40, overlength="truncate")
    whole = encoded(LONG_ANSWER).counts.target_tokens
    assert split.counts.cut_target_tokens == whole - split.counts.target_tokens > 0
    assert f"{split.counts.cut_target_tokens} trained tokens were cut" in caplog.text


def test_a_row_that_loses_all_its_targets_is_untrainable():
    split = encoded(TALK, LONG_ANSWER, max_length=40, overlength="truncate", on_bad_row="drop")
    assert (split.counts.kept, split.counts.untrainable) == (1, 1)
    with pytest.raises(DataError, match=r"no token to train on: rows.jsonl:1"):
        encoded(TALK, LONG_ANSWER, max_length=40, overlength="truncate")


@pytest.mark.parametrize("length", [2, 9, 10, 17, 18, 19])
def test_chunks_train_every_target_once_from_the_token_before_it(length: int):
    example = Example(list(range(length)), [True] * length)
    pairs = [pair for chunk in chunks(example, 9) for pair in zip(chunk.ids, chunk.ids[1:], strict=False)]
    assert pairs == list(zip(example.ids, example.ids[1:], strict=False))
    assert sum(chunk.targets for chunk in chunks(example, 9)) == example.targets


def test_split_makes_rows_of_text_and_refuses_a_prompt():
    counts = encoded(PlainText("", "x" * 100), PlainText("", "y"), max_length=40, overlength="split").counts
    assert (counts.read, counts.added, counts.kept, counts.cut_target_tokens) == (2, 2, 4, 0)
    with pytest.raises(DataError, match="cannot be split: its later parts would lack what they answer"):
        encoded(TALK, max_length=40, overlength="split")


def test_rows_that_train_nothing_stop_with_their_places_or_are_skipped_and_counted():
    mute = Conversation((Message("user", "a"),))
    with pytest.raises(DataError, match=r"2 rows have no token to train on: rows.jsonl:1, rows.jsonl:3"):
        encoded(mute, TALK, mute)
    assert encoded(mute, TALK, mute, on_bad_row="drop").counts.untrainable == 2
    with pytest.raises(DataError, match="no token to train on"):
        encoded(mute, on_bad_row="drop")


def test_split_turns_counts_the_rows_it_adds():
    twice = Conversation((*TALK.messages, *TALK.messages))
    counts = encoded(twice, TALK, split_turns=True).counts
    assert (counts.read, counts.added, counts.kept) == (2, 1, 3)


def test_a_row_that_begins_twice_is_refused():
    twice = tiny_tokenizer()
    twice.chat_template = "{{ bos_token }}" + str(twice.chat_template)
    with pytest.raises(DataError, match="begins twice"):
        Encoder(twice, "assistant").example(TALK, "row")


def test_a_cut_prompt_keeps_the_system_message_and_loses_the_beginning_of_the_users():
    talk = Conversation((Message("system", "Be brief."), Message("user", "x" * 40 + "y"), TALK.messages[1]))
    (whole,) = encoded(talk)
    (cut,) = encoded(talk, max_length=len(whole.ids) - 30, overlength="truncate_prompt")
    text = TOKENIZER.decode(whole.ids)
    assert TOKENIZER.decode(cut.ids) == text.replace("x" * 30, "", 1)
    assert trained(cut) == trained(whole)
    with pytest.raises(DataError, match="no room for a prompt"):
        encoded(talk, max_length=24, overlength="truncate_prompt")

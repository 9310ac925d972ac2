"""Truncation: protected tokens and targets stay, and every cut or dropped token is counted."""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from finetune.data.dataset import TokenizedDataset, check_dropped_rows
from finetune.data.documents import Conversation, Document, Message, PlainText
from finetune.data.encode import Encoder, Example
from finetune.data.token_store import TokenStore, TokenStoreWriter
from finetune.data.tokenized_source import TokenizedSource
from finetune.data.truncation import Truncation, chunks, cut_prompt
from finetune.errors import DataError
from finetune.recipe.sections.data import Data
from tests.fixtures.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TALK = Conversation((Message("user", "a" * 40), Message("assistant", "b" * 10)))
LONG_ANSWER = Conversation((Message("user", "a"), Message("assistant", "b" * 60)))


def encoded(*documents: Document, **settings: object) -> TokenizedDataset:
    section = Data.model_validate({"train": [{"path": "rows.jsonl"}], "max_dropped": 1, **settings})
    truncation = Truncation(Encoder(TOKENIZER, section.train_on), section)
    for line, document in enumerate(documents, start=1):
        truncation.add(document, line - 1, f"rows.jsonl:{line}")
    with TemporaryDirectory() as folder:
        with TokenStoreWriter(Path(folder)) as writer:
            writer.add(truncation.encoded())
        split = TokenizedDataset.whole([TokenizedSource(section.train[0], 0, [], TokenStore(Path(folder)))])
    check_dropped_rows(split, section)
    return split


def target_text(example: Example) -> str:
    return TOKENIZER.decode([i for i, target in zip(example.ids, example.is_target, strict=True) if target])


def test_truncate_prompt_cuts_after_bos_and_keeps_targets():
    split = encoded(TALK, max_length=40, overlength="truncate_prompt")
    (example,) = split
    assert len(example.ids) == 40
    assert example.ids[0] == TOKENIZER.bos_token_id
    assert target_text(example) == "b" * 10 + "<|end|>"
    assert (split.counts.truncated, split.counts.cut_target_tokens) == (1, 0)


@pytest.mark.parametrize(("longest", "is_possible"), [(4, True), (3, False)])
def test_cut_prompt_keeps_one_prompt_token(longest: int, is_possible: bool):
    example = Example([0, 1, 2, 3, 4], [False, False, True, True, True])
    assert (cut_prompt(example, longest, 0) is not None) == is_possible


def test_truncate_prompt_without_room_raises():
    with pytest.raises(DataError, match="no room for a prompt"):
        encoded(LONG_ANSWER, max_length=40, overlength="truncate_prompt")


def test_truncate_counts_cut_target_tokens(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        split = encoded(LONG_ANSWER, max_length=40, overlength="truncate")
    whole = encoded(LONG_ANSWER).counts.target_tokens
    assert split.counts.cut_target_tokens == whole - split.counts.target_tokens > 0
    assert f"removing {split.counts.cut_target_tokens} target tokens" in caplog.text


def test_truncate_removing_all_targets_counts_row_without_targets():
    split = encoded(TALK, LONG_ANSWER, max_length=40, overlength="truncate", on_bad_row="drop")
    assert (split.counts.kept, split.counts.bad["without target tokens"]) == (1, 1)
    with pytest.raises(DataError, match="no target tokens"):
        encoded(TALK, LONG_ANSWER, max_length=40, overlength="truncate")


@pytest.mark.parametrize("length", [2, 9, 10, 17, 18, 19])
def test_chunks_keep_every_target_once_with_its_predecessor(length: int):
    example = Example(list(range(length)), [True] * length)
    pairs = [pair for chunk in chunks(example, 9) for pair in zip(chunk.ids, chunk.ids[1:], strict=False)]
    assert pairs == list(zip(example.ids, example.ids[1:], strict=False))
    assert sum(chunk.targets for chunk in chunks(example, 9)) == example.targets


def test_overlength_split_splits_text_and_rejects_prompt():
    counts = encoded(PlainText("", "x" * 100), PlainText("", "y"), max_length=40, overlength="split").counts
    assert (counts.read, counts.added, counts.kept, counts.cut_target_tokens) == (2, 2, 4, 0)
    with pytest.raises(DataError, match="cannot be split: its later parts would have no prompt"):
        encoded(TALK, max_length=40, overlength="split")


def test_rows_without_targets_raise_with_places_or_are_dropped():
    unanswered = Conversation((Message("user", "a"),))
    with pytest.raises(DataError, match=r"2 rows without target tokens \(lines 1, 3\)"):
        encoded(unanswered, TALK, unanswered)
    assert encoded(unanswered, TALK, unanswered, on_bad_row="drop").counts.bad.total() == 2
    with pytest.raises(DataError, match="no target tokens"):
        encoded(unanswered, on_bad_row="drop")


def test_split_turns_counts_added_rows():
    twice = Conversation((*TALK.messages, *TALK.messages))
    counts = encoded(twice, TALK, split_turns=True).counts
    assert (counts.read, counts.added, counts.kept) == (2, 1, 3)


def test_row_with_two_bos_tokens_raises():
    twice = tiny_tokenizer()
    twice.chat_template = "{{ bos_token }}" + str(twice.chat_template)
    with pytest.raises(DataError, match="twice"):
        Encoder(twice, "assistant").examples(TALK, "row")[0]


def test_truncate_prompt_keeps_system_message():
    talk = Conversation((Message("system", "Be brief."), Message("user", "x" * 40 + "y"), TALK.messages[1]))
    (whole,) = encoded(talk)
    (cut,) = encoded(talk, max_length=len(whole.ids) - 30, overlength="truncate_prompt")
    text = TOKENIZER.decode(whole.ids)
    assert TOKENIZER.decode(cut.ids) == text.replace("x" * 30, "", 1)
    assert target_text(cut) == target_text(whole)
    with pytest.raises(DataError, match="no room for a prompt"):
        encoded(talk, max_length=24, overlength="truncate_prompt")


EXCHANGE = Conversation((Message("user", "a"), Message("assistant", "b")))
TWO_ANSWERS = Conversation(tuple(Message(role, "x" * 20) for role in ("user", "assistant") * 2))


def test_truncate_prompt_of_several_answers_names_keys_that_help():
    with pytest.raises(DataError) as caught:
        encoded(TWO_ANSWERS, max_length=60, overlength="truncate_prompt")
    hint = str(caught.value.hint)
    assert "data.split_turns" in hint
    assert "last_turn" in hint
    encoded(TWO_ANSWERS, max_length=60, overlength="truncate_prompt", split_turns=True)
    encoded(TWO_ANSWERS, max_length=60, overlength="truncate_prompt", train_on="last_turn")


@pytest.mark.parametrize("settings", [{"overlength": "error"}, {"overlength": "truncate_prompt", "split_turns": True}])
def test_too_long_row_names_split_turns_only_where_it_helps(settings: dict[str, object]):
    long = Conversation((*TWO_ANSWERS.messages[:3], Message("assistant", "y" * 60)))
    with pytest.raises(DataError) as caught:
        encoded(long, max_length=60, **settings)
    assert "split_turns" not in str(caught.value.hint)


@pytest.mark.parametrize("split_turns", [False, True])
def test_greetings_are_counted_once_a_row(split_turns: bool):
    greeted = Conversation((Message("assistant", "Welcome"), *TWO_ANSWERS.messages))
    report = encoded(greeted, TWO_ANSWERS, greeted, split_turns=split_turns).report
    ((text, note),) = report.notes.items()
    assert "greeting" in text
    assert (note.count, note.where) == (2, "rows.jsonl:1")


def test_max_dropped_error_names_max_length_only_where_rows_are_too_long():
    empty, settings = Conversation((Message("user", "a"), Message("assistant", ""))), {"on_bad_row": "drop"}
    with pytest.raises(DataError) as caught:
        encoded(TALK, empty, max_dropped=0.1, **settings)
    assert "max_length" not in str(caught.value.hint)
    assert "1 row with an empty answer" in caught.value.what
    with pytest.raises(DataError) as caught:
        encoded(EXCHANGE, LONG_ANSWER, max_length=65, overlength="drop", max_dropped=0.1, **settings)
    assert "raise data.max_length, or raise data.max_dropped" in str(caught.value.hint)


def test_truncation_without_cut_targets_counts_no_targets(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        encoded(TALK, max_length=40, overlength="truncate_prompt")
    assert "cut 1 of 1 row to 40 tokens" in caplog.text
    assert "target" not in caplog.text

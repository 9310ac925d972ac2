"""Prompts in engines: an engine with other tokens than the training is found, with the place."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from finetune.data.chat_template import ChatTemplate
from finetune.data.documents import Conversation, Document, Message, PlainText
from finetune.data.encode import Encoder
from finetune.errors import RefusedError
from finetune.jobs.export.engine_prompts import (
    CONVERSATIONS,
    TEXTS,
    PromptAgreement,
    compare,
    engine_adds_bos,
    run_prompts,
)
from finetune.jobs.export.engines import LlamaCpp, Ollama, RunPrompt, Vllm
from finetune.jobs.export.ollama import turns_of
from finetune.models.writing.gguf_vocabulary import GgufVocabulary
from tests.fixtures.tiny import byte_tokenizer

SPECIAL = ["<s>", "</s>", "<turn>"]
TURNS = "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
CALLS = (
    "{% for m in messages %}<turn>{{ m['role'] }}\n{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ c.function.name ~ ' ' ~ ARGUMENTS }}{% endfor %}{% else %}{{ m['content'] }}{% endif %}</s>\n{% endfor %}"
)
ASK = "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"


def tokenizer_of(template: str = "{{ bos_token }}" + TURNS + ASK, single: str = "$A") -> PreTrainedTokenizerFast:
    """A byte tokenizer; `single` is what its post-processor makes of a text."""
    tokenizer = byte_tokenizer(SPECIAL, template)
    special = [(token, index) for index, token in enumerate(SPECIAL, 256)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, pair=None, special_tokens=special)
    return tokenizer


def run_of(tokenizer: PreTrainedTokenizerFast, rows: list[Document] | None = None, is_chat: bool = True) -> Any:
    """A stand-in of a run with this tokenizer and these training rows."""
    located = [SimpleNamespace(document=row, where=str(index)) for index, row in enumerate(rows or [])]

    class Rows(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            return Rows(super().__getitem__(index))

        def documents(self) -> list[Any]:
            return list(self)

    data = SimpleNamespace(train=Rows(located))
    context = SimpleNamespace(
        tokenizer=tokenizer, encoder=Encoder(tokenizer, "assistant"), read_data=lambda on_event: data
    )
    return SimpleNamespace(context=context, record=SimpleNamespace(uses_chat_template=is_chat))


def prompts_of(tokenizer: PreTrainedTokenizerFast, rows: list[Document] | None = None, is_chat: bool = True) -> Any:
    return run_prompts(run_of(tokenizer, rows, is_chat), lambda event: None)


def in_vllm(
    trained: PreTrainedTokenizerFast, written: PreTrainedTokenizerFast, prompts: list[RunPrompt], folder: Path
) -> PromptAgreement:
    written.save_pretrained(folder)
    return compare([Vllm(folder, trained)], prompts, trained)[0]


def in_llama_cpp(
    tokenizer: PreTrainedTokenizerFast, prompts: list[RunPrompt], adds_bos: bool = False
) -> list[PromptAgreement]:
    vocabulary = GgufVocabulary.of(tokenizer, len(tokenizer), adds_bos=adds_bos)
    llama_cpp = LlamaCpp(Path("model.gguf"), vocabulary)
    turns = turns_of(ChatTemplate(tokenizer))
    assert turns is not None
    turns = turns.without_begin(SPECIAL[0] if adds_bos else "")
    return compare([llama_cpp, Ollama(turns, llama_cpp)], prompts, tokenizer)


def test_run_prompts_are_rows_and_then_fixed_ones():
    rows: list[Document] = [
        Conversation((Message("user", f"Row {index}"), Message("assistant", "A"))) for index in range(5)
    ]
    tokenizer = tokenizer_of()
    prompts = prompts_of(tokenizer, rows)
    assert len(prompts) == 3 + len(CONVERSATIONS)
    assert [prompt.text for prompt in prompts[:2]] == [
        f"<s><turn>user\nRow {index}</s>\n<turn>assistant\n" for index in (0, 1)
    ]
    assert all(tokenizer.decode(prompt.ids) == prompt.text for prompt in prompts)


def test_run_prompts_that_the_template_rejects_are_left_out():
    rejecting = TURNS.replace(
        "<turn>", "{% if m.role in ('system', 'tool') %}{{ raise_exception('no') }}{% endif %}<turn>", 1
    )
    assert len(prompts_of(tokenizer_of(rejecting + ASK))) == len(CONVERSATIONS) - 2


def test_run_prompts_of_plain_text_have_no_appended_end():
    prompts = prompts_of(tokenizer_of(single="<s> $A </s>"), [PlainText("a", "b"), PlainText("", "c")], is_chat=False)
    assert len(prompts) == 1 + len(TEXTS)
    assert all(prompt.ids[0] == 256 and 257 not in prompt.ids for prompt in prompts)


@pytest.mark.parametrize("single", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("has_begin", [True, False])
def test_engines_ask_conversations_as_trained(tmp_path: Path, single: str, has_begin: bool):
    """Whatever the tokenizer adds to plain text: it is not added to what a chat template writes."""
    tokenizer = tokenizer_of(("{{ bos_token }}" if has_begin else "") + TURNS + ASK, single)
    trained = run_of(tokenizer)
    prompts = run_prompts(trained, lambda event: None)
    adds_bos = engine_adds_bos(trained, prompts)
    assert adds_bos == (has_begin and single != "$A")
    found = [in_vllm(tokenizer, tokenizer, prompts, tmp_path), *in_llama_cpp(tokenizer, prompts, adds_bos)]
    assert [each.differing for each in found] == [0, 0, 0]
    assert [each.prompts for each in found] == [4, 4, 3]  # Ollama has no form for tools


@pytest.mark.parametrize("single", ["$A", "<s> $A", "<s> $A </s>"])
def test_llama_cpp_asks_plain_text_as_trained(single: str):
    tokenizer = tokenizer_of(single=single)
    trained = run_of(tokenizer, is_chat=False)
    prompts = run_prompts(trained, lambda event: None)
    adds_bos = engine_adds_bos(trained, prompts)
    assert adds_bos == (single != "$A")
    assert [each.differing for each in in_llama_cpp(tokenizer, prompts, adds_bos)] == [0, 0]
    wrong = in_llama_cpp(tokenizer, prompts, not adds_bos)[0]
    assert wrong.differing == wrong.prompts
    assert wrong.first is not None
    assert wrong.first.position == 0


def test_vllm_with_a_tokenizer_that_appends_an_end_is_reported_for_plain_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    tokenizer = tokenizer_of(single="<s> $A </s>")
    with caplog.at_level(logging.WARNING):
        found = in_vllm(tokenizer, tokenizer, prompts_of(tokenizer, is_chat=False), tmp_path)
    assert found.differing == found.prompts == len(TEXTS)
    assert found.first is not None
    assert (found.first.trained, found.first.engine) == ("", "'</s>' (257)")
    assert "add_special_tokens: false" in caplog.text
    assert "<s>" in caplog.text


def test_ollama_with_a_template_that_strips_messages_is_reported(caplog: pytest.LogCaptureFixture):
    tokenizer = tokenizer_of(TURNS.replace("m['content']", "m['content'] | trim") + ASK)
    with caplog.at_level(logging.WARNING):
        llama_cpp, ollama = in_llama_cpp(tokenizer, prompts_of(tokenizer))
    assert (llama_cpp.differing, ollama.differing) == (0, 1)
    assert ollama.first is not None
    assert ollama.first.position == len("turn user\n") - 4
    assert "Ollama makes other tokens of 1 of 3" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "differing"), [("(c.function.arguments | tojson)", 0), ("c.function.arguments", 1)]
)
def test_vllm_with_a_template_that_wants_json_text_is_reported(tmp_path: Path, arguments: str, differing: int):
    """vLLM hands over arguments as an object, which such a template prints as Python does."""
    tokenizer = tokenizer_of(CALLS.replace("ARGUMENTS", arguments) + ASK)
    found = in_vllm(tokenizer, tokenizer, prompts_of(tokenizer), tmp_path)
    assert found.differing == differing


@pytest.mark.parametrize(
    "change",
    [
        lambda core: setattr(core, "normalizer", normalizers.NFC()),
        lambda core: core.add_special_tokens([AddedToken("<end>", lstrip=True)]),
    ],
)
def test_llama_cpp_that_does_less_than_the_tokenizer_is_reported(change: Any):
    tokenizer = tokenizer_of()
    change(tokenizer.backend_tokenizer)
    row = Conversation((Message("user", "cafe\u0301"), Message("assistant", "A  <end>"), Message("user", "b")))
    rows: list[Document] = [replace(row, messages=(*row.messages, Message("assistant", "c")))]
    found = in_llama_cpp(tokenizer, prompts_of(tokenizer, rows))[0]
    assert 0 < found.differing < found.prompts


def test_tokenizer_that_gives_other_tokens_for_every_prompt_is_refused(tmp_path: Path):
    trained, other = tokenizer_of(), byte_tokenizer(["<s>", "</s>", "<x>", "<turn>"], "{{ bos_token }}" + TURNS + ASK)
    with pytest.raises(RefusedError, match=r"'<turn>' \(258\)"):
        in_vllm(trained, other, prompts_of(trained), tmp_path)


def test_chat_template_that_was_written_differently_is_reported(tmp_path: Path):
    trained, other = tokenizer_of(), tokenizer_of("{{ bos_token }}" + TURNS.replace("\n{{", " {{") + ASK)
    found = in_vllm(trained, other, prompts_of(trained), tmp_path)
    assert found.differing == found.prompts
    assert found.first is not None
    assert found.first.engine == f"' ' ({trained.convert_tokens_to_ids('Ġ')})"


def test_chat_template_that_fails_in_the_engine_is_reported(tmp_path: Path):
    trained, other = tokenizer_of(), tokenizer_of("{{ raise_exception('never') }}")
    found = in_vllm(trained, other, prompts_of(trained), tmp_path)
    assert found.differing == found.prompts
    assert found.first is not None
    assert found.first.engine == ""


def test_date_of_the_training_is_no_difference(tmp_path: Path):
    from datetime import date

    tokenizer = tokenizer_of("{{ strftime_now('%d %m %Y') }}" + TURNS + ASK)
    tokenizer.today = date(1999, 12, 31)
    prompts = prompts_of(tokenizer)
    assert prompts[0].text.startswith("31 12 1999")
    assert in_vllm(tokenizer, tokenizer, prompts, tmp_path).differing == 0


def test_llama_cpp_python_is_asked_where_it_is_installed(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[Any, ...]] = []

    class Llama:
        def __init__(self, path: str, **settings: Any) -> None:
            asked.append((path, settings))

        def tokenize(self, text: bytes, add_bos: bool, special: bool) -> list[int]:
            asked.append((text, add_bos, special))
            return [1, 2, 3]

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    tokenizer = tokenizer_of()
    engine = LlamaCpp(Path("a.gguf"), GgufVocabulary.of(tokenizer, len(tokenizer), adds_bos=True))
    assert "llama-cpp-python" in engine.by
    assert engine.prompt_ids(prompts_of(tokenizer)[0]) == [256, 1, 2, 3]
    assert asked[0] == ("a.gguf", {"vocab_only": True, "verbose": False})
    assert asked[1][1:] == (False, True)
    assert not asked[1][0].startswith(b"<s>")


def test_llama_cpp_python_that_does_not_load_the_file_is_not_used(monkeypatch: pytest.MonkeyPatch):
    def refuse(*given: Any, **settings: Any) -> None:
        raise ValueError("Failed to load model from file")

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=refuse))
    tokenizer = tokenizer_of()
    engine = LlamaCpp(Path("a.gguf"), GgufVocabulary.of(tokenizer, len(tokenizer)))
    assert "vocabulary" in engine.by
    assert engine.text_ids("<turn>") == [258]

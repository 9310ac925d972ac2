"""The vocabulary of a GGUF file: its metadata, and the ids that llama.cpp makes of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from finetune.errors import UnsupportedError
from finetune.models.writing.gguf_vocabulary import PATTERNS, GgufVocabulary
from tests.fixtures.tiny import byte_tokenizer

CORPUS = [
    "The bus to Mill Lane leaves at 7:15, the 12345th of 2026.",
    "  two spaces,\n\n\ta tab;  don't, we'll, I'VE",
    "naïve café 你好 🙂 été",
    "for i in range(10):\n    print(i)\n",
] * 3
TEXTS = [
    *CORPUS[:4],
    "<|end|>\n<|turn|>user\n  Hi\n<|end|>",
    "",
    "\n",
    "lanes and buses<|end|><|end|>",
    "e\u0301te\u0301 2026th",
]
SPECIAL = ["<|begin|>", "<|end|>", "<|turn|>"]
SPLITTERS: dict[str, Any] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
} | {
    name: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for name, pattern in PATTERNS.items()
}


def trained_tokenizer(splitter: Any, special: list[Any], **settings: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges of the corpus."""
    core = Tokenizer(models.BPE(**settings))
    core.pre_tokenizer = splitter
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    core.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|begin|>", eos_token="<|end|>")


def vocabulary_of(tokenizer: PreTrainedTokenizerFast, **more: Any) -> GgufVocabulary:
    return GgufVocabulary.of(tokenizer, len(tokenizer) + 7, **more)


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def metadata(vocabulary: GgufVocabulary, folder: Path) -> dict[str, Any]:
    """The fields of a file with this vocabulary."""
    writer = gguf.GGUFWriter(folder / "vocabulary.gguf", "llama")
    vocabulary.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(folder / "vocabulary.gguf").fields
    return {name.removeprefix("tokenizer."): field.contents() for name, field in fields.items()}


@pytest.mark.parametrize(("name", "ignores_merges"), [*((name, False) for name in SPLITTERS), ("llama-bpe", True)])
def test_vocabulary_ids_equal_those_of_the_tokenizer(name: str, ignores_merges: bool):
    tokenizer = trained_tokenizer(SPLITTERS[name], SPECIAL, ignore_merges=ignores_merges)
    vocabulary = vocabulary_of(tokenizer)
    assert vocabulary.pretokenizer == name
    for text in TEXTS:
        assert vocabulary.ids(text) == ids_of(tokenizer, text)
    assert len(vocabulary.ids(CORPUS[0])) < len(CORPUS[0].encode())  # merges apply


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda core: setattr(core, "normalizer", normalizers.NFC()), "e\u0301te\u0301"),
        (lambda core: core.add_special_tokens([AddedToken("<|wide|>", lstrip=True, rstrip=True)]), "a <|wide|> b"),
        (lambda core: setattr(core.pre_tokenizer, "add_prefix_space", True), "a word"),
    ],
)
def test_vocabulary_ids_differ_where_llama_cpp_does_less_than_the_tokenizer(change: Any, text: str):
    tokenizer = trained_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False), SPECIAL)
    change(tokenizer.backend_tokenizer)
    assert vocabulary_of(tokenizer).ids(text) != ids_of(tokenizer, text)
    assert vocabulary_of(tokenizer).ids("plain") == ids_of(tokenizer, "plain") or text == "a word"


def test_vocabulary_ids_find_the_longest_control_token_first():
    tokenizer = byte_tokenizer(["<|begin|>", "<|end|>", "<|end|><|of|>", "<|"], "")
    vocabulary = vocabulary_of(tokenizer)
    assert vocabulary.ids("a<|end|><|of|>b") == [ids_of(tokenizer, "a")[0], 258, ids_of(tokenizer, "b")[0]]
    assert vocabulary.ids("<|end|><|o") == [257, 259, *ids_of(tokenizer, "o")]


@pytest.mark.parametrize(
    ("answer_ends", "expected"),
    [
        ([], {"eos": 257}),
        ([257], {"eos": 257}),
        ([258], {"eos": 257, "eot": 258}),
        ([258, 257], {"eos": 257, "eot": 258}),
        ([258, 256, 259], {"eos": 257, "eot": 258, "eom": 256}),
        ([258, 258], {"eos": 257, "eot": 258}),
    ],
)
def test_vocabulary_names_the_ends_of_answers_beside_that_of_the_tokenizer(
    tmp_path: Path, answer_ends: list[int], expected: dict[str, int]
):
    tokenizer = byte_tokenizer(["<|begin|>", "<|text end|>", "<|turn end|>", "<|call end|>"], "")
    written = metadata(vocabulary_of(tokenizer, answer_ends=answer_ends), tmp_path)
    found = {
        name: written[f"ggml.{name}_token_id"] for name in ("eos", "eot", "eom") if f"ggml.{name}_token_id" in written
    }
    assert found == expected
    assert written["ggml.bos_token_id"] == 256


def test_vocabulary_of_a_tokenizer_without_an_end_takes_that_of_answers(tmp_path: Path):
    tokenizer = byte_tokenizer(["<|begin|>", "<|end|>", "<|turn|>"], "")
    tokenizer.eos_token = None
    written = metadata(vocabulary_of(tokenizer, answer_ends=[258]), tmp_path)
    assert written["ggml.eos_token_id"] == 258
    assert "ggml.eot_token_id" not in written


@pytest.mark.parametrize("adds_bos", [True, False])
def test_vocabulary_flags_never_append_an_end(tmp_path: Path, adds_bos: bool):
    vocabulary = vocabulary_of(byte_tokenizer(SPECIAL, ""), adds_bos=adds_bos)
    written = metadata(vocabulary, tmp_path)
    assert (written["ggml.add_bos_token"], written["ggml.add_eos_token"]) == (adds_bos, False)
    assert vocabulary.without_bos("<|begin|><|turn|>") == ("<|turn|>" if adds_bos else "<|begin|><|turn|>")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ a }}", {"chat_template": "{{ a }}"}),
        (None, {}),
        ({"default": "d"}, {"chat_template": "d"}),
        (
            {"tool_use": "t", "default": "d", "r.a-g": "r"},
            {
                "chat_template": "d",
                "chat_template.tool_use": "t",
                "chat_template.r_a_g": "r",
                "chat_templates": ["tool_use", "r_a_g"],
            },
        ),
        (
            {"rag": "r", "tool_use": "t"},
            {"chat_template.rag": "r", "chat_template.tool_use": "t", "chat_templates": ["rag", "tool_use"]},
        ),
    ],
)
def test_vocabulary_has_all_chat_templates(tmp_path: Path, template: Any, expected: dict[str, Any]):
    tokenizer = byte_tokenizer(SPECIAL, "")
    tokenizer.chat_template = template
    written = metadata(vocabulary_of(tokenizer), tmp_path)
    assert {name: value for name, value in written.items() if name.startswith("chat_template")} == expected


def test_vocabulary_has_a_token_for_each_row_of_the_embeddings(tmp_path: Path):
    tokenizer = byte_tokenizer(SPECIAL, "")
    written = metadata(vocabulary_of(tokenizer), tmp_path)
    assert len(written["ggml.tokens"]) == len(written["ggml.token_type"]) == len(tokenizer) + 7
    assert written["ggml.tokens"][256:259] == SPECIAL
    assert written["ggml.token_type"][255:260] == [1, 3, 3, 3, 5]


@pytest.mark.parametrize(
    "splitter", [pre_tokenizers.Whitespace(), pre_tokenizers.Sequence([pre_tokenizers.Digits(), SPLITTERS["gpt-2"]])]
)
def test_vocabulary_of_an_unknown_splitter_is_refused(splitter: Any):
    with pytest.raises(UnsupportedError, match="byte-level"):
        vocabulary_of(trained_tokenizer(splitter, SPECIAL))

"""Prompt tuning, p-tuning and prefix tuning: training, batching, saving, export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from finetune.adapters.base import AdapterMethod, PromptTokens
from finetune.adapters.p_tuning import PTuningMethod
from finetune.adapters.prefix_tuning import PrefixTuningMethod
from finetune.adapters.prompt_tuning import PromptTuningMethod
from finetune.adapters.soft_prompt import common_tokens
from finetune.data.collate import padded
from finetune.data.encode import Example
from finetune.errors import RefusedError, UnsupportedError
from finetune.evaluation.generation import Sampling, generate
from finetune.models.loading.load import load_model
from finetune.models.loading.model_files import ModelFolder
from finetune.quantizers.choice import Quantizers
from finetune.recipe.sections.adapter import PrefixTuning, PromptTuning, PTuning
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.quantization import Affine, FourBit, NoQuantization
from finetune.train.loss import summed_cross_entropy
from tests.fixtures.one_device import OneDevice
from tests.fixtures.tiny import SIZES, random_model, tiny_llama, tiny_tokenizer, write_tiny_model

PLACES = 6
IDS = torch.tensor([[256, 5, 9, 80, 41, 257, 30, 31]])
ROWS = [[256, 5, 9, 80], [256, 7], [256, 41, 30, 31, 99, 12, 3]]
"""Rows of different lengths."""

SECTIONS = {
    "prompt_tuning": PromptTuning(method="prompt_tuning", tokens=PLACES),
    "p_tuning lstm": PTuning(method="p_tuning", tokens=PLACES),
    "p_tuning mlp": PTuning(method="p_tuning", tokens=PLACES, encoder="mlp", hidden_size=16),
    "prefix_tuning": PrefixTuning(method="prefix_tuning", tokens=PLACES, projection=32),
    "prefix_tuning directly": PrefixTuning(method="prefix_tuning", tokens=PLACES, projection=None),
}
BASES = {"none": NoQuantization(), "nf4": FourBit(kind="nf4"), "affine": Affine(kind="affine")}

kinds = pytest.mark.parametrize("kind", SECTIONS)
on_bases = pytest.mark.parametrize("base", BASES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an output head of its own: with a tied one and no training it repeats the last token."""
    folder = tmp_path_factory.mktemp("models") / "untied"
    write_tiny_model(folder, tie_word_embeddings=False)
    return folder


def load(folder: Path, base: str = "none") -> PreTrainedModel:
    return load_model(
        ModelFolder(folder, "base"),
        Model(name=str(folder)),
        Quantizers(BASES[base]),
        weight_dtype=torch.float32,
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
    )


def method(kind: str | PromptTuning) -> AdapterMethod:
    section = SECTIONS[kind] if isinstance(kind, str) else kind
    classes = {"prompt_tuning": PromptTuningMethod, "p_tuning": PTuningMethod, "prefix_tuning": PrefixTuningMethod}
    return classes[section.method](section, (), tiny_tokenizer())


def prompted(kind: str | PromptTuning, model: PreTrainedModel) -> Any:
    torch.manual_seed(0)
    return method(kind).attach(model, 1)


def logits(model: nn.Module, ids: Tensor = IDS, **options: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, **options).logits


def batch() -> Any:
    return padded([Example(row, [True] * len(row)) for row in ROWS], padding=257)


def answers(model: nn.Module, rows: list[list[int]], batch_size: int, tokens: int = 12) -> list[str]:
    sampling = Sampling(max_new_tokens=tokens)
    return generate(model, tiny_tokenizer(), rows, sampling, batch_size=batch_size, padding=257)


# --- training


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("prompt_tuning", PLACES * 64),
        ("prefix_tuning directly", PLACES * 2 * 2 * 2 * 16),  # keys and values of 2 layers with 2 heads of width 16
    ],
)
def test_trainable_parameters_are_the_prompt_only(folder: Path, kind: str, numbers: int):
    model = prompted(kind, load(folder))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == numbers


@kinds
@on_bases
def test_step_changes_prompt_and_not_base(folder: Path, kind: str, base: str):
    model = prompted(kind, load(folder, base))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    summed_cross_entropy(model.train(), batch()).backward()
    assert all((p.grad is not None) == name.startswith("prompt.") for name, p in model.named_parameters())
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith("prompt.") for name in changed)


@kinds
def test_training_lowers_the_loss(folder: Path, kind: str):
    model = prompted(kind, load(folder))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(12):
        losses.append(summed_cross_entropy(model, batch()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning lstm"])
def test_gradient_checkpointing_gives_same_gradient(folder: Path, kind: str):
    def gradients(checkpointed: bool) -> list[Tensor]:
        base = load(folder)
        if checkpointed:
            base.activation_checkpointing_enable({"use_reentrant": False})
        model = prompted(kind, base)
        summed_cross_entropy(model.train(), batch()).backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, again)


# --- initial values


def embeddings(model: PreTrainedModel, text: str) -> Tensor:
    return model.get_input_embeddings()(torch.tensor(tiny_tokenizer()(text)["input_ids"]))


def starting_as(model: PreTrainedModel, start: dict[str, Any], tokens: int = PLACES) -> Tensor:
    return prompted(PromptTuning(method="prompt_tuning", tokens=tokens, start=start), model).prompt()


def test_initial_prompt_repeats_text(folder: Path):
    model = load(folder)
    prompt = starting_as(model, {"kind": "text", "text": "Hi!?"})
    assert torch.equal(prompt, embeddings(model, "Hi!?Hi"))


def test_initial_prompt_of_text_matches_text(folder: Path):
    model = load(folder)
    text = tiny_tokenizer()("Hi!?Hi", return_tensors="pt")["input_ids"]
    expected = logits(model, torch.cat([text, IDS], dim=1))[:, PLACES:]
    tuned = prompted(PromptTuning(method="prompt_tuning", tokens=PLACES, start={"kind": "text", "text": "Hi!?"}), model)
    assert torch.allclose(logits(tuned), expected, atol=1e-5)
    assert not torch.allclose(logits(model), expected, atol=1e-2)


def test_initial_text_longer_than_prompt_is_refused(folder: Path):
    with pytest.raises(UnsupportedError, match="has 7 tokens, and the prompt 6"):
        starting_as(load(folder), {"kind": "text", "text": "Hi there"[:7]})


def test_initial_prompt_of_labels_uses_token_means(folder: Path):
    model = load(folder)
    prompt = starting_as(model, {"kind": "labels", "labels": ["good", "x"]})
    assert torch.allclose(prompt[0], embeddings(model, "good").mean(0))
    assert torch.equal(prompt[1], embeddings(model, "x")[0])
    words = model.get_input_embeddings().weight[common_tokens(tiny_tokenizer())]
    assert all((row == words).all(1).any() for row in prompt[2:])


def test_common_tokens_exclude_special_and_keep_vocabulary_order():
    tokenizer = tiny_tokenizer()
    found = common_tokens(tokenizer).tolist()
    assert found == sorted(found)
    assert not set(found) & set(tokenizer.added_tokens_decoder)
    assert tokenizer.convert_tokens_to_ids("a") in found
    assert tokenizer.convert_tokens_to_ids("Ġ") not in found  # white space alone
    assert tokenizer.convert_tokens_to_ids("é") not in found  # half a letter


def test_common_tokens_are_repeated_for_long_prompt(folder: Path):
    assert starting_as(load(folder), {"kind": "vocabulary"}, tokens=300).shape == (300, 64)


def test_initial_uniform_prompt_uses_interval_of_paper(folder: Path):
    prompt = starting_as(load(folder), {"kind": "uniform"}, tokens=200)
    assert prompt.abs().max() <= 0.5
    assert abs(prompt.std() - 1 / 12**0.5) < 0.01  # of a normal distribution of the same width, 0.5 / 3


def test_initial_prefix_matches_its_tokens(folder: Path):
    model = load(folder)
    words = logits(prompted("prompt_tuning", model))
    assert torch.allclose(logits(prompted("prefix_tuning directly", model)), words, atol=1e-5)
    assert not torch.allclose(logits(model), words, atol=1e-2)


# --- batching


def learned_positions() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=64, n_embd=64, n_layer=2, n_head=4)).eval()


def sliding_windows() -> PreTrainedModel:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    return MistralForCausalLM(config).eval()


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "rotary": tiny_llama,
    "learned positions": learned_positions,
    "sliding windows": sliding_windows,
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", ["left", "right"])
@kinds
def test_padding_changes_no_logits(kind: str, side: str, architecture: str):
    model = prompted(kind, ARCHITECTURES[architecture]())
    longest = max(map(len, ROWS))
    gaps = [longest - len(row) for row in ROWS]
    blank = [([257] * gap, [0] * gap) for gap in gaps]
    left = side == "left"
    ids = torch.tensor([pad + row if left else row + pad for (pad, _), row in zip(blank, ROWS, strict=True)])
    mask = torch.tensor(
        [no + [1] * len(row) if left else [1] * len(row) + no for (_, no), row in zip(blank, ROWS, strict=True)]
    )
    together = logits(model, ids, attention_mask=mask)
    for row, gap, found in zip(ROWS, gaps, together, strict=True):
        own = found[gap:] if left else found[: len(row)]
        assert torch.allclose(own, logits(model, torch.tensor([row]))[0], atol=1e-5)


@pytest.mark.parametrize("keep", [2, torch.tensor([1, 4, 6])], ids=["last", "chosen"])
def test_prefix_before_left_padding_keeps_the_wanted_logits(keep: int | Tensor):
    model = prompted("prefix_tuning directly", sliding_windows())
    ids, mask = torch.tensor([[257] * 3 + ROWS[0], ROWS[2]]), torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    everything = logits(model, ids, attention_mask=mask)
    columns = slice(-keep, None) if isinstance(keep, int) else keep
    kept = logits(model, ids, attention_mask=mask, logits_to_keep=keep)
    is_token = mask[:, columns].bool()
    assert torch.allclose(kept[is_token], everything[:, columns][is_token], atol=1e-6)


def mistral(window: int | None) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # answers that depend on what is read
    return model


def by_column() -> PreTrainedModel:
    """A model that takes the column of a token for its position, whatever `position_ids` say."""
    model = tiny_llama(tie_word_embeddings=False).eval()
    own = model.forward
    model.forward = lambda **inputs: own(**{**inputs, "position_ids": None})
    return model


COUNTING: dict[str, Callable[[], PreTrainedModel]] = {
    "window 64": lambda: mistral(64),
    "window and full attention": lambda: random_model(
        Gemma3TextConfig(**SIZES, sliding_window=32, layer_types=["sliding_attention", "full_attention"])
    ).eval(),
    "distances by column": by_column,
}
"""Models that count padding between a cache and a row."""

LONG_ROWS = [[256, *((7 * place + row) % 250 for place in range(length))] for row, length in enumerate((4, 30, 30, 99))]


def written_alone(model: Any, rows: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy answers without padding, from the logits of the model's own forward pass, a row at a time."""
    found = []
    for row in rows:
        ids = torch.tensor([row])
        for _ in range(tokens):
            ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
        found.append(ids[0, len(row) :].tolist())
    return found


@pytest.mark.parametrize("architecture", COUNTING)
def test_prefix_answers_of_a_batch_equal_those_of_single_rows(architecture: str):
    model = prompted("prefix_tuning directly", COUNTING[architecture]())
    with torch.no_grad():
        model.prompt.embedding.mul_(3)
    longest = max(map(len, LONG_ROWS))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in LONG_ROWS])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in LONG_ROWS])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
    expected = written_alone(model, LONG_ROWS, 12)
    written = model.generate(ids, mask, **options)
    assert torch.equal(written[:, :longest], ids)
    assert written[:, longest:].tolist() == expected
    # The control: with the padding between prefix and row, answers differ.
    with torch.no_grad():
        assert model._continued(ids, mask, **options)[:, longest:].tolist() != expected


@pytest.mark.parametrize(("window", "batches"), [(64, 3), (200, 1), (None, 1)])
def test_prefix_batches_are_split_only_where_a_window_is_shorter_than_the_rows(window: int | None, batches: int):
    model = prompted("prefix_tuning directly", mistral(window))
    calls: list[int] = []
    own = model.base.generate
    model.base.generate = lambda **options: (calls.append(len(options["input_ids"])), own(**options))[1]
    answers(model, LONG_ROWS, batch_size=4)
    assert len(calls) == batches


def test_prefix_answers_that_end_early_are_padded():
    model = prompted("prefix_tuning directly", mistral(64))
    ids = torch.tensor([[0] * 95 + LONG_ROWS[0], LONG_ROWS[3]])
    mask = torch.tensor([[0] * 95 + [1] * 5, [1] * 100])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 7}
    first = model.generate(ids, mask, eos_token_id=[], **options)[0, 100].item()
    written = model.generate(ids, mask, eos_token_id=[first], **options)
    assert written[0, 100:].tolist() == [first] + [7] * 11


def test_stock_peft_changes_logits_with_left_padding(folder: Path, tmp_path: Path):
    stock = in_peft(prompted("prompt_tuning", load(folder)), "prompt_tuning", folder, tmp_path)
    alone = logits(stock, torch.tensor([ROWS[0]]))[0, PLACES:]
    padded_left = logits(stock, torch.tensor([[257] * 3 + ROWS[0]]), attention_mask=torch.tensor([[0] * 3 + [1] * 4]))
    assert not torch.allclose(padded_left[0, PLACES + 3 :], alone, atol=1e-3)


@kinds
def test_logits_to_keep_ignores_prompt(folder: Path, kind: str):
    model = prompted(kind, load(folder))
    everything = logits(model)
    columns = torch.tensor([1, 4, 7])
    assert everything.shape[1] == IDS.shape[1]
    assert torch.allclose(logits(model, logits_to_keep=columns), everything[:, columns], atol=1e-6)
    assert torch.allclose(logits(model, logits_to_keep=2), everything[:, -2:], atol=1e-6)


@kinds
@on_bases
def test_generation_of_batch_matches_single_rows(folder: Path, kind: str, base: str):
    model = prompted(kind, load(folder, base))
    alone = answers(model, ROWS, batch_size=1)
    assert answers(model, ROWS, batch_size=3) == alone
    assert alone != answers(model.base, ROWS, batch_size=1)  # the prompt matters


@kinds
def test_generation_follows_the_logits(folder: Path, kind: str):
    model = prompted(kind, load(folder))
    expected = IDS
    for _ in range(5):
        expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], dim=1)
    mask = torch.ones_like(IDS)
    assert torch.equal(model.generate(IDS, mask, max_new_tokens=5, do_sample=False, eos_token_id=[]), expected)


@kinds
def test_repetition_penalty_ignores_prompt(folder: Path, kind: str):
    model = prompted(kind, load(folder))
    scores = logits(model)[0, -1]
    repeated = IDS[0].unique()
    scores[repeated] = torch.where(scores[repeated] < 0, scores[repeated] * 3, scores[repeated] / 3)
    written = model.generate(IDS, torch.ones_like(IDS), repetition_penalty=3.0, max_new_tokens=1, do_sample=False)
    assert written[0, -1] == scores.argmax()


# --- saving


def in_peft(model: Any, kind: str, folder: Path, saved: Path) -> nn.Module:
    """The saved prompt before the same base, by stock PEFT."""
    method(kind).save(model, saved)
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), saved)


@kinds
@on_bases
def test_soft_prompt_round_trips_through_disk(folder: Path, tmp_path: Path, kind: str, base: str):
    model = prompted(kind, load(folder, base))
    method(kind).save(model, tmp_path)
    again = method(kind).load(load(folder, base), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(again.base))
    assert not any(p.requires_grad for p in again.parameters())


@kinds
def test_loaded_prompt_matches_training_under_autocast(folder: Path, tmp_path: Path, kind: str):
    model = prompted(kind, load(folder))
    method(kind).save(model, tmp_path)
    again = method(kind).load(load(folder), tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(again), logits(model))


@kinds
def test_stock_peft_gives_same_logits(folder: Path, tmp_path: Path, kind: str):
    model = prompted(kind, load(folder))
    stock = in_peft(model, kind, folder, tmp_path)
    assert torch.allclose(logits(stock)[:, -IDS.shape[1] :], logits(model), atol=1e-6)


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning"])
def test_load_refuses_prompt_of_other_shape(folder: Path, tmp_path: Path, kind: str):
    method(kind).save(prompted(kind, load(folder)), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    prompt = load_file(file)["prompt_embeddings"]
    for tensors in ({"prompt_embeddings": prompt[1:]}, {"prompt_embeddings": prompt[:, 1:]}, {"other": prompt}):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        with pytest.raises(RefusedError, match="shape"):
            method(kind).load(load(folder), tmp_path)


# --- merging and export


@kinds
def test_merge_is_refused_with_hint(folder: Path, tmp_path: Path, kind: str):
    with pytest.raises(UnsupportedError, match=r"ft export|PEFT"):
        method(kind).mergeable(load(folder), tmp_path)


def test_prefix_export_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(UnsupportedError, match="cannot hold"):
        method("prefix_tuning").export_prompt(load(folder), tmp_path, tiny_tokenizer(), unlikely=7)


def exported_prompt(kind: str, base: PreTrainedModel, folder: Path, unlikely: int = 7) -> tuple[PromptTokens, Any]:
    """A new prompt as tokens of `base`, and their tokenizer; `folder` is where the prompt goes in between."""
    method(kind).save(prompted(kind, base), folder)
    tokenizer = tiny_tokenizer()
    return method(kind).export_prompt(base, folder, tokenizer, unlikely), tokenizer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocabulary", [259, 262])  # as many rows as tokens, and three that no token needs
@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning lstm"])
def test_exported_tokens_match_prompt(tmp_path: Path, kind: str, vocabulary: int, tied: bool):
    base = tiny_llama(tie_word_embeddings=tied, vocab_size=vocabulary)
    known = len(tiny_tokenizer())
    base.generation_config.suppress_tokens = list(range(known, vocabulary))  # which only an untrained model would write
    model = prompted(kind, base)
    expected, written = logits(model)[..., :known], answers(model, ROWS, batch_size=1)
    prompt, tokenizer = exported_prompt(kind, base, tmp_path)
    prompt.model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    words = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert words(prompt.text)["input_ids"] == prompt.ids
    found = logits(plain, torch.cat([torch.tensor([prompt.ids]), IDS], dim=1))[:, PLACES:]
    assert torch.allclose(found[..., :known], expected, atol=1e-6)
    assert not torch.allclose(logits(plain)[..., :known], expected, atol=1e-2)
    assert torch.equal(found[..., prompt.ids], found[..., [7] * PLACES])
    assert answers(plain, [prompt.ids + row for row in ROWS], batch_size=3) == written
    chat = words.apply_chat_template([{"role": "user", "content": "x"}], tokenize=True)["input_ids"]
    assert chat[: PLACES + 1] == [*prompt.ids, 256]


def test_exported_tokens_are_never_generated(folder: Path, tmp_path: Path):
    base = load(folder)
    top1 = int(logits(prompted("prompt_tuning", base))[0, -1].argmax())
    prompt, _ = exported_prompt("prompt_tuning", base, tmp_path, unlikely=top1)  # only the settings hold them back then
    rows = torch.cat([torch.tensor([prompt.ids]), IDS], dim=1).expand(100, -1)

    def written() -> set[int]:
        torch.manual_seed(0)
        return set(prompt.model.generate(rows, max_new_tokens=1, do_sample=True, eos_token_id=[])[:, -1].tolist())

    assert not written() & set(prompt.ids)
    prompt.model.generation_config.suppress_tokens = None
    assert written() & set(prompt.ids)


def test_model_with_exported_prompt_refuses_second_export(folder: Path, tmp_path: Path):
    prompt, tokenizer = exported_prompt("prompt_tuning", load(folder), tmp_path)
    with pytest.raises(UnsupportedError, match="already"):
        method("prompt_tuning").export_prompt(prompt.model, tmp_path, tokenizer, unlikely=7)


@pytest.mark.parametrize("tied", [True, False])
def test_prompt_export_of_a_base_on_another_device_reads_the_prompt_from_the_cpu(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, chosen = tiny_llama(tie_word_embeddings=tied), method("prompt_tuning")
    prompt_PE = torch.zeros(PLACES, base.config.hidden_size)
    monkeypatch.setattr(chosen, "_saved_prompt", lambda model, folder: prompt_PE)
    base.to("meta")
    with OneDevice():
        prompt = chosen.export_prompt(base, tmp_path, tiny_tokenizer(), unlikely=7)
    assert {parameter.device.type for parameter in prompt.model.parameters()} == {"meta"}

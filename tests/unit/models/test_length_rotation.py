"""Rows of models whose rotation depends on the longest row of a pass are computed as alone, by transformers itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import DynamicCache, LlamaConfig, PreTrainedModel

from finetune.adapters.soft_prompt_model import (
    EmbeddedPromptModel,
    FixedPrompt,
    KeyShape,
    PrefixedModel,
    SoftPromptModel,
)
from finetune.data.batch_plan import BatchPlan, one_group
from finetune.data.collate import padded
from finetune.data.encode import Example
from finetune.errors import UnsupportedError
from finetune.evaluation import likelihood
from finetune.evaluation.generation import Sampling, generate
from finetune.evaluation.likelihood import Likelihood, likelihoods
from finetune.evaluation.loss import compute_validation_loss
from finetune.models.kernels import length_rotation as module
from finetune.models.kernels.length_rotation import LengthRotation, length_rotation
from finetune.models.kernels.packing_check import (
    check_rotation_of_passes,
    prefix_sharing_blocker,
    use_packing_attention,
)
from finetune.models.loading.load import load_model
from finetune.models.loading.model_files import ModelFolder
from finetune.quantizers.choice import Quantizers
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.quantization import NoQuantization
from finetune.recipe.sections.training import Training
from finetune.train.loss import summed_cross_entropy
from tests.fixtures.length_models import LENGTH_MODELS, stock_model, write_length_model
from tests.fixtures.tiny import tiny_tokenizer

# Both sides of 32 and the length itself; some of equal length, some with the same first tokens.
LENGTHS = (10, 32, 33, 60, 33, 12, 32, 47, 61)


def rows() -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    shared = torch.randint(5, 250, (8,), generator=generator).tolist()
    found = []
    for length in LENGTHS:
        ids = shared + torch.randint(5, 250, (length - len(shared),), generator=generator).tolist()
        found.append(Example(ids, [False] * 9 + [True] * (length - 9)))
    return found


def load(folder: Path) -> PreTrainedModel:
    return load_model(
        ModelFolder(folder, "org/name"),
        Model(name="org/name"),
        Quantizers(NoQuantization()),
        weight_dtype=torch.float32,
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
    )


def stock_gradient(folder: Path, examples: list[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of rows, each alone in a new model."""
    total, gradients = 0.0, dict[str, torch.Tensor]()
    for row in examples:
        model = stock_model(folder)
        labels = torch.tensor(
            [[token if is_target else -100 for token, is_target in zip(row.ids, row.is_target, strict=True)]]
        )
        loss = model(input_ids=torch.tensor([row.ids]), labels=labels).loss * row.targets
        loss.backward()
        total += float(loss.detach())
        for name, parameter in model.named_parameters():
            gradients[name] = gradients.get(name, 0) + parameter.grad
    return total, gradients


def plan_of(batching: str, rotation: LengthRotation, group_of: Callable[[int], int] | None = None) -> BatchPlan:
    training = Training(batching=batching, micro_batch_size=4, gradient_accumulation_steps=4)  # type: ignore[arg-type]
    group_of = group_of or rotation.group
    lengths = np.array(LENGTHS)
    return BatchPlan.of(training, lengths, 128, 0, may_share=batching == "padding_free", group_of=group_of)


def trained(folder: Path, plan: BatchPlan) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of one step over all rows with ft's passes."""
    model = load(folder).requires_grad_(True)
    if plan.restarts_positions:
        use_packing_attention(model, may_choose=True)
        assert prefix_sharing_blocker(model) is None
    examples, total = rows(), 0.0
    units = [[examples[row] for row in plan.rows_of(unit)] for unit in range(plan.units)]
    for batch in plan.micro_batches(units, rank=0, world_size=1):
        loss = summed_cross_entropy(model, batch)
        loss.backward()
        total += float(loss.detach())
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in made:
            made[name] = write_length_model(name, tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return folder_of


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


@pytest.mark.parametrize("batching", ["padded", "padding_free", "packed"])
@pytest.mark.parametrize("name", LENGTH_MODELS)
def test_training_step_has_loss_and_gradient_of_rows_alone(name: str, batching: str, folders: Callable[[str], Path]):
    folder = folders(name)
    rotation = LengthRotation.of(LENGTH_MODELS[name]())
    assert rotation is not None
    loss, gradient = trained(folder, plan_of(batching, rotation))
    expected, of_rows = stock_gradient(folder, rows())
    assert loss == pytest.approx(expected, rel=1e-5)
    assert difference(gradient, of_rows) < 2e-4
    mixed, of_mixed = trained(folder, plan_of(batching, rotation, one_group))
    assert abs(mixed / expected - 1) > 3e-5, "the same without groups: the rows cannot tell"
    assert difference(of_mixed, of_rows) > 1e-2


def validated(folder: Path, batch_size: int) -> float:
    measured = compute_validation_loss(
        load(folder),
        rows(),
        accelerator=Accelerator(),
        compute_dtype=torch.float32,
        batch_size=batch_size,
        make_batch=partial(padded, padding=0),
    )
    return measured.loss * measured.tokens


@pytest.mark.parametrize("name", LENGTH_MODELS)
def test_validation_loss_does_not_depend_on_the_batch(
    name: str, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    folder = folders(name)
    expected, _ = stock_gradient(folder, rows())
    assert validated(folder, 8) == pytest.approx(expected, rel=1e-5)
    assert validated(folder, 1) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(LengthRotation, "group", lambda self, tokens: 0)
    assert abs(validated(folder, 8) / expected - 1) > 3e-5


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("name", LENGTH_MODELS)
def test_likelihoods_are_those_of_rows_alone(
    name: str, shares: bool, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    """Of rows of 33 tokens too, whose last one is beyond the original length and predicts nothing."""
    monkeypatch.setattr(likelihood, "WORTH_SHARING", 1)
    folder = folders(name)
    model = load(folder)
    if shares:
        use_packing_attention(model, may_choose=True)
    found: dict[int, Likelihood] = {}
    likelihoods(
        model,
        rows(),
        compute_dtype=torch.float32,
        batch_size=8,
        padding=0,
        may_share=lambda: shares and prefix_sharing_blocker(model) is None,
        on_batch=found.update,
    )
    expected = [-stock_gradient(folder, [row])[0] for row in rows()]
    assert [found[row].log_prob for row in range(len(rows()))] == pytest.approx(expected, rel=1e-5)


# Short, on the way across 32 (two of the same length), at 32, beyond.
END = (257,)
"""Padding and the end of text, which answers do not show."""

PROMPTS = [rows()[3].ids[:length] for length in (8, 12, 25, 27, 32, 33, 40)] + [rows()[8].ids[:25]]


def continued(model: PreTrainedModel, batch_size: int = 8) -> list[str]:
    sampling = Sampling(max_new_tokens=16)
    return generate(model, tiny_tokenizer(), PROMPTS, sampling, batch_size=batch_size, padding=257)


@pytest.mark.parametrize("name", LENGTH_MODELS)
def test_answers_of_a_batch_are_those_of_transformers_for_each_prompt(
    name: str, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    """With the cache as transformers keeps it: Phi-3 computes a row anew where it passes the original length."""
    folder, tokenizer = folders(name), tiny_tokenizer()
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        written = stock_model(folder).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=257
        )
        expected.append(tokenizer.decode([token for token in written[0, len(prompt) :].tolist() if token not in END]))
    assert continued(load(folder)) == expected
    monkeypatch.setattr(LengthRotation, "generation_group", lambda self, tokens, new: 0)
    assert continued(load(folder)) != expected, "the same in one batch: the prompts cannot tell"


@pytest.mark.parametrize("batching", ["padded", "padding_free", "packed"])
@pytest.mark.parametrize("name", LENGTH_MODELS)
def test_check_of_passes_finds_plans_that_mix_lengths(name: str, batching: str, folders: Callable[[str], Path]):
    model = load(folders(name))
    rotation = length_rotation(model)
    assert rotation is not None
    plan = plan_of(batching, rotation)
    if plan.restarts_positions:
        use_packing_attention(model, may_choose=True)
    check_rotation_of_passes(model, rotation, plan.passes, plan.restarts_positions)
    mixing = plan_of(batching, rotation, one_group)
    with pytest.raises(UnsupportedError, match="beside one of 33"):
        check_rotation_of_passes(model, rotation, mixing.passes, plan.restarts_positions)


def test_check_of_passes_finds_a_rotation_that_remembers_longer_rows(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    """transformers keeps the frequencies of a longer row until one has less than the original length."""
    monkeypatch.setattr(module, "_rope_types", lambda embedding: {})
    model = load(folders("llama-dynamic"))
    rotation = length_rotation(model)
    assert rotation is not None
    with pytest.raises(UnsupportedError, match="other logits beside one of 33"):
        check_rotation_of_passes(model, rotation, plan_of("padded", rotation).passes, is_flattened=False)


@pytest.mark.parametrize(
    ("tokens", "long", "dynamic"), [(1, 0, 0), (27, 0, 0), (28, 1, 33), (60, 1, 65)]
)  # behind a prompt of 5
def test_group_of_a_row_counts_the_soft_prompt(tokens: int, long: int, dynamic: int):
    assert LengthRotation(32, each_length=False, prompt=5).group(tokens) == long
    assert LengthRotation(32, each_length=True, prompt=5).group(tokens) == dynamic


@pytest.mark.parametrize(
    ("tokens", "new", "long", "dynamic"),
    [(10, 22, 0, 0), (10, 23, 10, 10), (32, 1, 32, 32), (33, 1, -1, 33), (90, 400, -1, 90)],
)
def test_generation_group_is_the_length_of_prompts_that_may_cross(tokens: int, new: int, long: int, dynamic: int):
    assert LengthRotation(32, each_length=False).generation_group(tokens, new) == long
    assert LengthRotation(32, each_length=True).generation_group(tokens, new) == dynamic


@pytest.mark.parametrize(
    "parameters",
    [
        None,
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    ],
)
def test_other_rotations_do_not_depend_on_lengths(parameters: dict[str, object] | None):
    assert LengthRotation.of(LlamaConfig(rope_parameters=parameters)) is None


def test_legacy_names_of_a_rotation_are_read():
    """`type` and `rope_scaling` are the names of earlier versions of transformers."""
    config = LlamaConfig(max_position_embeddings=64, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert LengthRotation.of(config) == LengthRotation(64, each_length=True)


PLACES = 5
SOFT_LENGTHS = (10, 27, 28, 29, 12, 40)  # 27 and the prompt of 5 are 32


def soft_rows() -> list[Example]:
    return [Example(rows()[8].ids[:length], [False] * 4 + [True] * (length - 4)) for length in SOFT_LENGTHS]


def soft_prompt(width: int) -> torch.Tensor:
    return torch.randn(PLACES, width, generator=torch.Generator().manual_seed(1)) * 0.3


def validated_behind(model: SoftPromptModel, batch_size: int) -> float:
    measured = compute_validation_loss(
        model,
        soft_rows(),
        accelerator=Accelerator(),
        compute_dtype=torch.float32,
        batch_size=batch_size,
        make_batch=partial(padded, padding=0),
    )
    return measured.loss * measured.tokens


@torch.no_grad()
def stock_loss_behind(folder: Path, row: Example, kind: str, prompt: torch.Tensor) -> float:
    model, ids = stock_model(folder), torch.tensor([row.ids])
    labels = torch.tensor(
        [[token if is_target else -100 for token, is_target in zip(row.ids, row.is_target, strict=True)]]
    )
    if kind == "prompt":
        embeddings = torch.cat([prompt[None], model.get_input_embeddings()(ids)], dim=1)
        labels = torch.cat([torch.full((1, PLACES), -100), labels], dim=1)
        return float(model(inputs_embeds=embeddings, labels=labels).loss) * row.targets
    cache = DynamicCache(config=model.config)
    for layer, (key, value) in enumerate(prompt.view(PLACES, 2, 2, 2, 16).permute(1, 2, 3, 0, 4)):
        cache.update(key[None], value[None], layer)
    positions = torch.arange(PLACES, PLACES + len(row.ids))[None]
    return float(model(input_ids=ids, past_key_values=cache, position_ids=positions, labels=labels).loss) * row.targets


def with_prompt(model: PreTrainedModel, kind: str, prompt: torch.Tensor) -> SoftPromptModel:
    if kind == "prompt":
        return EmbeddedPromptModel(model, FixedPrompt(prompt))
    return PrefixedModel(model, FixedPrompt(prompt), KeyShape.of(model))


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["phi3-longrope", "llama-dynamic"])
def test_rows_behind_a_soft_prompt_are_computed_as_alone(name: str, kind: str, folders: Callable[[str], Path]):
    """The prompt is part of the length that decides."""
    folder = folders(name)
    prompt = soft_prompt(64 if kind == "prompt" else 2 * 2 * 2 * 16)
    expected = sum(stock_loss_behind(folder, row, kind, prompt) for row in soft_rows())
    model = with_prompt(load(folder), kind, prompt)
    assert validated_behind(model, 8) == pytest.approx(expected, rel=1e-5)
    assert validated_behind(model, 1) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("kind", "lengths"), [("prompt", [20]), ("prefix", [20]), ("prefix", [40])])
def test_answer_whose_soft_prompt_would_be_dropped_is_refused(
    kind: str, lengths: list[int], folders: Callable[[str], Path]
):
    """Phi-3 drops its cache where a row passes the original length, and computes it anew without the prompt."""
    prompt = soft_prompt(64 if kind == "prompt" else 2 * 2 * 2 * 16)
    model = with_prompt(load(folders("phi3-longrope")), kind, prompt)
    prompts = [rows()[3].ids[:length] for length in lengths]
    with pytest.raises(UnsupportedError, match="drops its cache"):
        generate(model, tiny_tokenizer(), prompts, Sampling(max_new_tokens=16), batch_size=4, padding=257)


@pytest.mark.parametrize("name", ["phi3-longrope", "llama-dynamic"])
def test_answers_behind_a_soft_prompt_are_those_of_prompts_alone(name: str, folders: Callable[[str], Path]):
    folder, tokenizer, prompt = folders(name), tiny_tokenizer(), soft_prompt(64)
    # With the prompt of 5 and 16 new tokens: within 32, and beyond from the start.
    prompts = [rows()[3].ids[:length] for length in (8, 11, 28, 40)]
    expected = []
    for ids in prompts:
        model = stock_model(folder)
        embeddings = torch.cat([prompt[None], model.get_input_embeddings()(torch.tensor([ids]))], dim=1)
        written = model.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=257,
        )
        expected.append(tokenizer.decode([token for token in written[0].tolist() if token not in END]))
    model = with_prompt(load(folder), "prompt", prompt)
    assert generate(model, tokenizer, prompts, Sampling(16), batch_size=4, padding=257) == expected

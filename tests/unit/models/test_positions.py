"""The positions of a model, and what a row beyond them meets, against what transformers' own forward pass does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BartConfig,
    BioGptConfig,
    BloomConfig,
    CodeGenConfig,
    CTRLConfig,
    FalconConfig,
    GitConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    OpenAIGPTConfig,
    OPTConfig,
    PreTrainedConfig,
    RobertaConfig,
    RwkvConfig,
    XGLMConfig,
)

from finetune.errors import DataError
from finetune.models.loading.model_files import ModelFolder
from finetune.models.loading.positions import PositionLimit, position_limit

COUNT = 24
T: dict[str, Any] = {"vocab_size": 320, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
WIDE: dict[str, Any] = {**T, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BLOCKS: dict[str, Any] = {**WIDE, "intermediate_size": 128}
GPT: dict[str, Any] = {**T, "n_embd": 64, "n_layer": 2, "n_head": 4}
DECODER: dict[str, Any] = {**T, "d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
OPT = {**WIDE, "ffn_dim": 128, "word_embed_proj_dim": 64}

TABLES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: GPT2Config(**GPT, n_positions=COUNT),
    "gpt2 with n_ctx": lambda: GPT2Config(**GPT, n_positions=COUNT, n_ctx=512),
    "gpt_bigcode": lambda: GPTBigCodeConfig(**GPT, n_positions=COUNT),
    "gpt_neo": lambda: GPTNeoConfig(
        **T,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=COUNT,
    ),
    "opt": lambda: OPTConfig(**OPT, max_position_embeddings=COUNT),
    "openai-gpt": lambda: OpenAIGPTConfig(**GPT, n_positions=COUNT),
    "gptj": lambda: GPTJConfig(**GPT, n_positions=COUNT, rotary_dim=8),
    "codegen": lambda: CodeGenConfig(**GPT, n_positions=COUNT, n_ctx=512, rotary_dim=8),
    "ctrl": lambda: CTRLConfig(**T, n_positions=COUNT, n_embd=64, dff=64, n_layer=2, n_head=4),
    "biogpt": lambda: BioGptConfig(**BLOCKS, max_position_embeddings=COUNT),
    "bart": lambda: BartConfig(**DECODER, is_decoder=True, max_position_embeddings=COUNT),
    "mpt": lambda: MptConfig(**T, d_model=64, n_heads=4, n_layers=2, max_seq_len=COUNT),
    # Positions count from behind the padding's row.
    "roberta": lambda: RobertaConfig(
        **{**BLOCKS, "pad_token_id": 1}, is_decoder=True, max_position_embeddings=COUNT + 2
    ),
}
COMPUTED: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**BLOCKS, max_position_embeddings=COUNT),
    "gpt_neox": lambda: GPTNeoXConfig(**BLOCKS, max_position_embeddings=COUNT),
    "falcon": lambda: FalconConfig(**WIDE, max_position_embeddings=COUNT, alibi=False),
    "falcon with alibi": lambda: FalconConfig(**WIDE, max_position_embeddings=COUNT, alibi=True),
    "bloom": lambda: BloomConfig(**T, hidden_size=64, n_layer=2, n_head=4, seq_length=COUNT),
    "xglm": lambda: XGLMConfig(
        **{**T, "pad_token_id": 1},
        d_model=64,
        ffn_dim=64,
        num_layers=2,
        attention_heads=4,
        max_position_embeddings=COUNT,
    ),
    "rwkv": lambda: RwkvConfig(**T, hidden_size=64, num_hidden_layers=2, context_length=COUNT),
    "jamba": lambda: JambaConfig(
        **BLOCKS,
        max_position_embeddings=COUNT,
        num_key_value_heads=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        use_mamba_kernels=False,
    ),
}
UNLIMITED: dict[str, Callable[[], PreTrainedConfig]] = {
    "bloom": lambda: BloomConfig(**T, hidden_size=64, n_layer=2, n_head=4),
    "mamba": lambda: MambaConfig(**T, hidden_size=64, num_hidden_layers=2, state_size=8),
}


def limit_of(config: PreTrainedConfig, folder: Path) -> PositionLimit:
    config.save_pretrained(folder)
    return position_limit(ModelFolder(folder, "m"))


def runs(config: PreTrainedConfig, tokens: int) -> bool:
    """Whether transformers computes a row of so many tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    try:
        with torch.no_grad():
            model(input_ids=torch.randint(5, 250, (1, tokens)), use_cache=False)
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


@pytest.mark.parametrize("family", TABLES)
def test_row_beyond_a_table_of_positions_fails_and_is_known_to(family: str, tmp_path: Path):
    config = TABLES[family]()
    assert limit_of(config, tmp_path) == PositionLimit(COUNT, is_table=True)
    assert runs(config, COUNT)
    assert not runs(config, COUNT + 1)


@pytest.mark.parametrize("family", COMPUTED)
def test_row_beyond_computed_positions_runs(family: str, tmp_path: Path):
    config = COMPUTED[family]()
    assert limit_of(config, tmp_path) == PositionLimit(COUNT)
    assert runs(config, COUNT + 1)


@pytest.mark.parametrize("family", UNLIMITED)
def test_models_without_a_stated_length_have_no_limit(family: str, tmp_path: Path):
    config = UNLIMITED[family]()
    assert limit_of(config, tmp_path) == PositionLimit(None)
    assert runs(config, 4 * COUNT)


def test_table_of_an_image_encoder_is_not_the_limit(tmp_path: Path):
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GitConfig(**BLOCKS, max_position_embeddings=400, vision_config={**vision, "image_size": 32})
    assert limit_of(config, tmp_path) == PositionLimit(400, is_table=True)


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gpt_neox", "falcon", "dbrx", "kimi_linear", "bailing_hybrid", "rwkv"]
)
def test_positions_of_a_saved_config_are_those_of_its_architecture(family: str, tmp_path: Path):
    """Each architecture saves its context length under its own key; transformers has one name for all of them."""
    config = CONFIG_MAPPING[family]()
    assert config.max_position_embeddings != 320
    config.max_position_embeddings = 320
    assert limit_of(config, tmp_path).count == 320


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "llava"])
def test_positions_of_a_vision_language_config_are_those_of_its_language_model(family: str, tmp_path: Path):
    config = CONFIG_MAPPING[family]()
    config.get_text_config().max_position_embeddings = 320
    assert limit_of(config, tmp_path) == PositionLimit(320)


def test_count_that_the_file_leaves_out_is_the_architecture_s_own(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_layer": 1}))
    assert position_limit(ModelFolder(tmp_path, "m")) == PositionLimit(1024, is_table=True)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}, 4 * COUNT),
        ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, COUNT),
    ],
)
def test_dynamic_ntk_reaches_its_factor_times_the_length_of_the_config(
    parameters: dict[str, Any], expected: int, tmp_path: Path
):
    config = LlamaConfig(**BLOCKS, max_position_embeddings=COUNT, rope_parameters=parameters)
    assert limit_of(config, tmp_path).count == expected


def test_soft_prompt_takes_positions():
    limit = PositionLimit(64, is_table=True).after(10)
    limit.check_rows([54, 20], str, "rows", "")
    with pytest.raises(
        DataError, match="55 tokens, more than the 54 positions after the 10 of its soft prompt"
    ) as error:
        limit.check_rows([20, 55, 56], "file:{}".format, "rows", "")
    assert error.value.where == "file:1"
    assert "2 of 3" in error.value.what


def test_rows_beyond_computed_positions_are_counted_in_a_warning(caplog: pytest.LogCaptureFixture):
    PositionLimit(64).check_rows([65, 64, 90], str, "training rows", "set data.max_length")
    assert "2 of 3 training rows are longer than the 64 positions" in caplog.text
    assert "90 tokens" in caplog.text


@pytest.mark.parametrize(("tokens", "room"), [(60, 4), (64, 0), (70, 0)])
def test_prompt_without_room_is_an_error_with_the_room(tokens: int, room: int):
    limit = PositionLimit(64, is_table=True)
    with pytest.raises(DataError, match=f"a prompt of {tokens} tokens and an answer of 5 exceed the 64 pos") as error:
        limit.check_room([3, tokens], "row {}".format, 5, "--max-new-tokens")
    assert error.value.where == "row 1"
    assert error.value.hint == (f"set --max-new-tokens to {room} or less" if room else "shorten the prompt")
    limit.check_room([59], str, 5, "--max-new-tokens")
    PositionLimit(None).check_room([10_000], str, 5, "--max-new-tokens")

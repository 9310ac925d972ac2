from __future__ import annotations

import pytest

from finetune.models.layer_names import endings, ends_with, nearest_ending, nearest_part, shown

NAMES = [f"model.layers.{block}.{part}" for block in range(2) for part in ("self_attn.q_proj", "mlp.gate_proj")]


@pytest.mark.parametrize(
    ("name", "ending", "matches"),
    [
        ("model.norm", "norm", True),
        ("model.norm", "model.norm", True),
        ("norm", "norm", True),
        ("model.input_layernorm", "norm", False),
        ("model.norm", "odel.norm", False),
        ("model.norm.weight", "norm", False),
    ],
)
def test_ending_begins_at_a_dot(name: str, ending: str, matches: bool):
    assert ends_with(name, ending) == matches


def test_endings_are_last_parts_and_numbers_with_their_list():
    assert endings(["a.b.down", "a.c.down", "experts.3", "lm_head"]) == ["down", "experts.3", "lm_head"]
    assert shown(f"layer{number:02}" for number in range(20)).endswith("layer11, ...")


@pytest.mark.parametrize(
    ("wanted", "near"),
    [
        ("gate_projj", "gate_proj"),
        ("o_proj.weight", "q_proj"),
        ("*.layers.0.*.q_prj", "q_proj"),
        ("Q_PROJ", "q_proj"),
        ("layers.9.gate_proj", "gate_proj"),
    ],
)
def test_nearest_ending_of_a_name_is_hinted(wanted: str, near: str):
    hint = nearest_ending(wanted, NAMES)
    assert hint.startswith(f"did you mean {near}?")
    assert "gate_proj, q_proj" in hint


def test_name_without_a_near_one_lists_all():
    assert nearest_ending("wte", NAMES) == "names end in: gate_proj, q_proj"


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("*.layer.0.*", "layers"), ("*.self_atn.*", "self_attn"), ("model.*.gate_pro[j]x", "gate_proj")],
)
def test_nearest_part_of_a_pattern_is_hinted(pattern: str, near: str):
    hint = nearest_part(pattern, NAMES)
    assert f"did you mean {near}?" in hint
    assert "model.layers.0.self_attn.q_proj" in hint


def test_pattern_of_known_parts_has_no_nearest_one():
    assert "mean" not in nearest_part("*.7.*.q_proj", NAMES)

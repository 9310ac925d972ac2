"""LoRA ranks: parsing of layer names, and the text table."""

from __future__ import annotations

import pytest

from finetune.run.lora_ranks import Grid, table

LLAMA = {
    f"model.layers.{block}.{kind}": block
    for block in (0, 2, 10)
    for kind in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
}


def test_grid_parses_block_and_kind():
    grid = Grid.of(LLAMA)
    assert (grid.blocks, grid.kinds) == (["0", "2", "10"], ["q", "v", "down"])
    assert grid.names["10", "v"] == "model.layers.10.self_attn.v_proj"


def test_grid_keeps_long_names_if_short_ones_collide():
    grid = Grid.of(["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj"])
    assert grid.kinds == ["attn.c_attn", "attn.c_proj", "mlp.c_proj"]


def test_grid_gives_layers_outside_blocks_their_own_row():
    grid = Grid.of([*LLAMA, "lm_head"])
    assert grid.blocks == ["", "0", "2", "10"]
    assert grid.names["", "lm_head"] == "lm_head"


def test_table_has_rows_of_blocks_columns_of_kinds_and_means():
    ranks = {name: rank for name, rank in LLAMA.items() if name != "model.layers.2.mlp.down_proj"}
    assert table(ranks) == [
        "block    q    v  down  mean",
        "    0    0    0     0   0.0",
        "    2    2    2     -   2.0",
        "   10   10   10    10  10.0",
        " mean  4.0  4.0   5.0   4.2",
    ]


@pytest.mark.parametrize(("width", "fits"), [(27, True), (26, False)])
def test_table_wider_than_width_is_none(width: int, fits: bool):
    assert (table(LLAMA, width) is not None) == fits

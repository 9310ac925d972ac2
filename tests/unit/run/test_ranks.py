"""Which layer is which, and ranks as a table and as a picture."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from finetune.run.events import RanksChosen
from finetune.run.ranks import Grid, picture, table

LLAMA = {
    f"model.layers.{block}.{kind}": block
    for block in (0, 2, 10)
    for kind in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
}
SVG = "{http://www.w3.org/2000/svg}"


def test_layers_are_told_by_block_and_by_what_they_are_called_in_it():
    grid = Grid.of(LLAMA)
    assert (grid.blocks, grid.kinds) == (["0", "2", "10"], ["q", "v", "down"])
    assert grid.names["10", "v"] == "model.layers.10.self_attn.v_proj"


def test_names_that_shortened_would_be_the_same_stay_long():
    grid = Grid.of(["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj"])
    assert grid.kinds == ["attn.c_attn", "attn.c_proj", "mlp.c_proj"]


def test_a_layer_outside_of_all_blocks_has_a_row_of_its_own():
    grid = Grid.of([*LLAMA, "lm_head"])
    assert grid.blocks == ["", "0", "2", "10"]
    assert grid.names["", "lm_head"] == "lm_head"


def test_the_table_has_a_row_a_block_a_column_a_kind_and_means():
    ranks = {name: rank for name, rank in LLAMA.items() if name != "model.layers.2.mlp.down_proj"}
    assert table(ranks) == [
        "block    q    v  down  mean",
        "    0    0    0     0   0.0",
        "    2    2    2     -   2.0",
        "   10   10   10    10  10.0",
        " mean  4.0  4.0   5.0   4.2",
    ]


@pytest.mark.parametrize(("width", "fits"), [(27, True), (26, False)])
def test_a_table_that_is_too_wide_is_none(width: int, fits: bool):
    assert (table(LLAMA, width) is not None) == fits


def test_the_picture_shows_how_long_each_layer_had_which_rank():
    names = ["layers.0.q_proj", "layers.1.q_proj", "layers.0.<odd>"]
    history = [
        RanksChosen(step=0, ranks=dict.fromkeys(names, 4)),
        RanksChosen(step=5, ranks={names[0]: 4, names[1]: 1, names[2]: 4}),
        RanksChosen(step=8, ranks={names[0]: 4, names[1]: 0, names[2]: 2}),
    ]
    root = ElementTree.fromstring(picture(history, total_steps=10))
    bars = {}
    for layer in root.iter(f"{SVG}g"):
        widths = [float(bar.get("width")) for bar in layer.iter(f"{SVG}rect")]
        bars[layer.find(f"{SVG}title").text] = ([width / sum(widths) for width in widths], layer[-1].text)
    assert bars == {
        "layers.0.q_proj: 4": ([1.0], "4"),
        "layers.1.q_proj: 4 → 1 → 0": (pytest.approx([0.5, 0.3, 0.2], abs=1e-3), "0"),
        "layers.0.<odd>: 4 → 2": (pytest.approx([0.8, 0.2], abs=1e-3), "2"),
    }
    shades = {bar.get("fill") for layer in root.iter(f"{SVG}g") for bar in layer.iter(f"{SVG}rect")}
    assert len(shades) == 4
    assert "12 in all at first, 6 in the end" in "".join(root.itertext())


def test_panels_that_do_not_fit_in_a_line_go_to_the_next():
    names = [f"layers.0.kind{index}" for index in range(9)]
    root = ElementTree.fromstring(picture([RanksChosen(step=0, ranks=dict.fromkeys(names, 2))], total_steps=3))
    edges = [float(bar.get("x", 0)) + float(bar.get("width")) for bar in root.iter(f"{SVG}rect")]
    assert max(edges) <= float(root.get("width"))
    heights = {bar.get("y") for layer in root.iter(f"{SVG}g") for bar in layer.iter(f"{SVG}rect")}
    assert len(heights) == 2

"""The chart of LoRA ranks."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from finetune.report.lora_ranks import picture
from finetune.run.events import RanksChosen

SVG = "{http://www.w3.org/2000/svg}"


def test_picture_shows_duration_of_each_rank():
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
    shades = {bar.get("fill-opacity", "0") for layer in root.iter(f"{SVG}g") for bar in layer.iter(f"{SVG}rect")}
    assert len(shades) == 4
    assert "12 in total at first, 6 at the end" in "".join(root.itertext())


def test_picture_wraps_panels_into_rows():
    names = [f"layers.0.kind{index}" for index in range(9)]
    root = ElementTree.fromstring(picture([RanksChosen(step=0, ranks=dict.fromkeys(names, 2))], total_steps=3))
    edges = [float(bar.get("x", 0)) + float(bar.get("width")) for bar in root.iter(f"{SVG}rect")]
    assert max(edges) <= float(root.get("width"))
    heights = {bar.get("y") for layer in root.iter(f"{SVG}g") for bar in layer.iter(f"{SVG}rect")}
    assert len(heights) == 2

"""Charts: positions, ticks, scales and tooltips, for any values."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from finetune.report.chart import BOX, MOST_POINTS, MOST_READINGS, Axis, Series, chart, smoothed

PLAIN = Axis(lambda value: f"{value:g}")


def plot(*series: Series, axis: Axis = PLAIN) -> ElementTree.Element:
    return ElementTree.fromstring(chart("title", series, axis))


def coordinates(path: ElementTree.Element) -> list[tuple[float, float]]:
    return [tuple(map(float, place.split())) for place in re.split("[MLZ]", path.get("d", "")) if place]  # type: ignore[misc]


def ticks(root: ElementTree.Element) -> dict[str, float]:
    """Labels of the y axis, and their positions in percent from the top."""
    return {
        text.text or "": float((text.get("y") or "").rstrip("%"))
        for text in root.iter("text")
        if text.get("text-anchor") == "end" and text.get("y")
    }


def test_chart_line_spans_plot_and_orders_values():
    (path,) = plot(Series("loss", [(1, 3.0), (2, 1.0), (3, 2.0)])).iter("path")
    (left, top), (middle, bottom), (right, between) = coordinates(path)
    assert (left, middle, right) == (0, BOX / 2, BOX)
    assert 0 < top < between < bottom < BOX
    assert between == (top + bottom) / 2


def test_chart_ticks_match_positions_of_values():
    root = plot(Series("loss", [(0, 1.0), (1, 4.0), (2, 2.0)]))
    (path,) = root.iter("path")
    found = ticks(root)
    assert {"1", "2", "4"} <= found.keys()
    for value, (_, y) in zip(("1", "4", "2"), coordinates(path), strict=True):
        assert found[value] == pytest.approx(100 * y / BOX, abs=0.1)


def test_chart_axis_is_logarithmic_for_wide_range_if_allowed():
    points = [(0, 100.0), (1, 10.0), (2, 1.0)]
    for may_be, is_even in ((True, True), (False, False)):
        (path,) = plot(Series("loss", points), axis=Axis(str, may_be_logarithmic=may_be)).iter("path")
        first, second, third = (y for _, y in coordinates(path))
        assert (second - first == pytest.approx(third - second, abs=0.2)) == is_even


@pytest.mark.parametrize(
    "points",
    [[(1, 0.0)], [(1, 0.0), (2, 0.0)], [(5, 1e-30), (6, 1e30)], [(0, -1.0), (1, 1.0)], [(3, 1e300), (4, 1.0)]],
    ids=str,
)
@pytest.mark.parametrize("axis", [PLAIN, Axis(str, may_be_logarithmic=True), Axis(str, from_zero=True)])
def test_chart_stays_inside_plot_for_any_range(points: list[tuple[float, float]], axis: Axis):
    root = plot(Series("loss", points, dotted=True), axis=axis)
    for path in root.iter("path"):
        assert all(0 <= coordinate <= BOX for place in coordinates(path) for coordinate in place)
    assert all(0 <= y <= 100 for y in ticks(root).values())
    assert 1 <= len(ticks(root)) <= 13


def test_chart_drops_non_finite_points():
    (path,) = plot(Series("loss", [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)])).iter("path")
    assert len(coordinates(path)) == 2
    assert chart("title", [Series("loss", [(0, math.nan)])], PLAIN) == ""
    assert chart("title", [], PLAIN) == ""


def test_chart_of_many_points_draws_means_and_band():
    points = [(step, float(step % 2)) for step in range(100_000)]
    text = chart("title", [Series("loss", points)], PLAIN)
    band, line = ElementTree.fromstring(text).iter("path")
    assert len(coordinates(line)) <= MOST_POINTS
    assert len({y for _, y in coordinates(line)}) == 1  # the mean
    assert len({y for _, y in coordinates(band)}) == 2  # both values
    assert len(text) < 100_000


def test_chart_tooltips_show_all_lines_and_cover_plot():
    root = plot(
        Series("a", [(0, 1.5), (1, 2.5)]), Series("b", [(1, 7.0)], dotted=True), Series("c", [(0, 0)], faint=True)
    )
    strips = [group for group in root.iter("g") if group.get("class") == "at"]
    assert [strip.find("text").text for strip in strips] == ["step 0: a 1.5", "step 1: a 2.5, b 7"]  # type: ignore[union-attr]
    widths = [float(strip.find("rect").get("width").rstrip("%")) for strip in strips]  # type: ignore[union-attr]
    assert sum(widths) == pytest.approx(100, abs=0.1)


def test_chart_limits_number_of_tooltips():
    root = plot(Series("loss", [(step, 1.0) for step in range(5000)]))
    assert 50 <= len([g for g in root.iter("g") if g.get("class") == "at"]) <= MOST_READINGS


def test_smoothed_keeps_constant_and_follows_fall():
    assert [y for _, y in smoothed([(step, 3.0) for step in range(100)])] == pytest.approx([3.0] * 100)
    falling = smoothed([(step, 100.0 - step) for step in range(100)])
    values = [y for _, y in falling]
    assert values == sorted(values, reverse=True)
    assert (values[0], values[-1]) == (100.0, 1.0)
    (_, low), (_, mean), (_, high) = smoothed([(0, 1.0), (1, 5.0), (2, 3.0)])
    assert (low, mean, high) == (1.0, 3.0, 3.0)

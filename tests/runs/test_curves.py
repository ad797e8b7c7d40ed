# SPDX-License-Identifier: Apache-2.0
"""The picture of a comparison: it shows what was measured, names can be read, and no name is markup."""

import itertools
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpquant.runs.pages.curves import _TEXT, apart, curves

SVG = "{http://www.w3.org/2000/svg}"
ROWS = {"none": [[0.3, 0.5, 0.6], [0.4, 0.6, 0.7]], "dp<b>": [[0.2, 0.4, 0.8]]}


def points(line):
    return [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]


def test_lines_are_means_in_a_band_of_all_seeds():
    root = ElementTree.fromstring(curves(ROWS))
    lines, bands = ([points(one) for one in root.iter(SVG + kind)] for kind in ("polyline", "polygon"))
    (none, ours), (band, no_band) = lines, bands
    assert len(none) == 3 and len(band) == 6
    for place, (x, y) in enumerate(none):
        assert band[place][0] == x == band[-1 - place][0]
        assert y == pytest.approx((band[place][1] + band[-1 - place][1]) / 2, abs=0.2), "the mean of two seeds"
    assert no_band[:3] == ours == no_band[:2:-1], "a single seed has no width"
    assert ours[2][1] < none[2][1] and ours[0][1] > none[0][1], "80 % is above 65 %, and 20 % below 35 %"


def test_names_end_with_the_last_mean_and_are_escaped():
    root = ElementTree.fromstring(curves(ROWS))
    texts = [text.text for text in root.iter(SVG + "text")]
    assert {"none 65.0%", "dp<b> 80.0%", "test accuracy", "epoch"} <= set(texts)
    assert "<b>" not in curves(ROWS)


@pytest.mark.parametrize("rows", [{"a": [[0.5]]}, {"a": [[1.0, 1.0]]}, {"a": [[0.0] * 200], "b": [[1.0] * 200]}])
def test_any_accuracies_can_be_drawn(rows):
    root = ElementTree.fromstring(curves(rows))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for line in root.iter(SVG + "polyline"):
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points(line))


@given(st.lists(st.floats(0, 400), min_size=1, max_size=12))
def test_names_stand_on_no_other_nor_below_the_picture(heights):
    placed = sorted(apart({str(place): height for place, height in enumerate(heights)}, 376).values())
    assert all(lower - upper >= _TEXT - 1e-9 for upper, lower in itertools.pairwise(placed)) and placed[-1] <= 376

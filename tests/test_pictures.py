# SPDX-License-Identifier: Apache-2.0
"""Pictures of experiments: every name can be read, and what is drawn is what was measured."""

import itertools
import shutil

import pytest
from experiments import pictures
from experiments.drawing import COLOURS, KINDS, OTHER, colour_of, draw_rows, label_ends, new_figure
from experiments.published import published
from experiments.runner import RESULTS, Site
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

HEIGHTS = st.lists(st.floats(0, 100), min_size=1, max_size=12)


def names_of(axes):
    """Return where the names stand, in pixels, from below."""
    return sorted(axes.transAxes.transform((0, text.xyann[1]))[1] for text in axes.texts)


def named(heights):
    figure, axes = new_figure()
    for height in heights:
        axes.plot([0, 1], [0, height])
    label_ends(axes, {f"row {place}": (1, height, OTHER) for place, height in enumerate(heights)})
    return figure, axes


def legible(figure, axes):
    text = 8 * figure.dpi / 72
    return all(upper - lower >= text for lower, upper in itertools.pairwise(names_of(axes)))


@given(HEIGHTS)
@settings(max_examples=20, deadline=None)
def test_names_do_not_stand_on_each_other_nor_above_the_picture(heights):
    figure, axes = named(heights)
    assert legible(figure, axes)
    assert names_of(axes)[-1] <= axes.transAxes.transform((0, 1))[1] + 1


def test_names_on_each_other_would_be_seen():
    figure, axes = new_figure()
    for place in range(2):
        axes.annotate(f"row {place}", (1, 1), (1.01, 0.5), textcoords="axes fraction")
    assert not legible(figure, axes)


def test_a_row_shows_its_mean_its_seeds_and_the_papers_figure(tmp_path):
    axes = draw_rows({"static": [50, 70], "dpquant": [80]}, tmp_path / "x.png", "A title", paper={"static": 55})
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dpquant", "static"]  # best first
    marks = {(line.get_marker(), tuple(map(float, line.get_xdata()))) for line in axes.lines}
    assert {("o", (80.0,)), ("o", (60.0,)), ("o", (50.0, 70.0)), ("D", (55.0,))} <= marks
    assert {"80.0", "60.0", "the paper"} <= {text.get_text() for text in axes.texts}


@pytest.mark.parametrize(
    ("row", "colour"),
    [("int4-clip, dpquant 0.75", "blue"), ("FP4 in 50 %, a fixed random set", "vermilion"), ("int8 all", "green")],
)
def test_a_row_has_the_colour_of_its_kind(row, colour):
    assert colour_of(row) == COLOURS[colour]
    assert colour_of("luq") == OTHER
    assert OTHER not in KINDS.values()


def test_every_picture_is_redrawn_from_the_committed_results_alone(tmp_path):
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results, ignore=shutil.ignore_patterns("*.png"))
    pictures.run(Site(work=tmp_path, folders={}, results=results), readme=tmp_path / "result.png")
    drawn = {path.stem for path in results.glob("*.png")}
    assert drawn == {path.stem for path in RESULTS.glob("*.png")}
    for path in [tmp_path / "result.png", *results.glob("*.png")]:
        assert len(Image.open(path).convert("RGB").getcolors(10**6)) > 10  # not a blank page


def test_the_papers_figures_are_read_without_their_spread():
    assert published("baselines-gtsrb")["static 0.5"] == 69.06
    assert published("a table of ours") == {}

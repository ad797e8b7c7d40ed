# SPDX-License-Identifier: Apache-2.0
"""How the experiments' pictures are drawn: names beside what they name, and colours that the colour-blind tell apart.

A table is a line of marks for each of its rows: a filled mark for the mean, a hollow one for each seed, a line from the
lowest to the highest, a diamond for the paper's figure. No colour has to be looked up in a legend.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "black": "#222222",
}
"""Okabe and Ito's colours, which the colour-blind tell apart; yellow is left out, as it is faint on white."""

KINDS = {
    "full precision": COLOURS["black"],
    "dpquant": COLOURS["blue"],
    "static": COLOURS["vermilion"],
    "fixed": COLOURS["vermilion"],
    "rotate": COLOURS["orange"],
    "prioritise": COLOURS["purple"],
    "int8": COLOURS["green"],
    "int4": COLOURS["sky"],
}
"""{word in the name of a row: its colour}; the first word that occurs counts."""
OTHER = "#666666"


def draw_rows(
    rows: Mapping[str, Sequence[float]],
    path: Path,
    title: str,
    *,
    paper: Mapping[str, float],
    ordered: bool = True,
    measure: str = "test accuracy, %",
    digits: int = 1,
    note: str | None = None,
) -> "Axes":
    """Draw one line of marks for each row, and return what was drawn on.

    Args:
      rows: {row: a percentage for each seed}.
      path: of the PNG file to write.
      title: of the picture.
      paper: {row: the paper's percentage}; may lack rows.
      ordered: by the mean, best first; False: as given.
      measure: what is measured, on the axis.
      digits: of a mean, behind the point.
      note: below the axis; None: what the marks mean.
    """
    means = {row: statistics.mean(values) for row, values in rows.items()}
    names = sorted(rows, key=lambda row: -means[row]) if ordered else list(rows)
    figure, axes = new_figure(height=1.1 + 0.27 * len(names))
    reference = next((means[row] for row in names if row.startswith("full precision")), None)
    if reference is not None and sum(row.startswith("full precision") for row in names) == 1:
        axes.axvline(reference, color=KINDS["full precision"], linewidth=0.8, linestyle=":", zorder=0)
    for place, row in enumerate(names):
        values, colour = rows[row], colour_of(row)
        axes.plot([min(values), max(values)], [place, place], color=colour, linewidth=2, alpha=0.4)
        if len(values) > 1:
            axes.plot(values, [place] * len(values), "o", markersize=5, color="white", markeredgecolor=colour)
        axes.plot(means[row], place, "o", markersize=7.5, color=colour)
        axes.annotate(
            f"{means[row]:.{digits}f}",
            (max(values), place),
            (9, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
        if row in paper:
            axes.plot(paper[row], place, "D", markersize=5.5, color="white", markeredgecolor=OTHER)
    if paper:
        first = min(paper, key=names.index)
        axes.annotate(
            "the paper", (paper[first], names.index(first)), (-8, 0), textcoords="offset points",
            ha="right", va="center", fontsize=8, color=OTHER,
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(measure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    seeds = max(map(len, rows.values()))
    marks = "filled: mean; hollow: each seed" if seeds > 1 else "one seed"
    marks += "; diamond: the paper's figure" if paper else ""
    figure.supxlabel(marks if note is None else note, fontsize=8, color=OTHER)
    figure.savefig(path, dpi=130)
    return axes


def colour_of(row: str) -> str:
    """Return the colour of a row, by the first of `KINDS` that it names."""
    return next((colour for kind, colour in KINDS.items() if kind in row), OTHER)


def new_figure(columns: int = 1, *, width: float = 7.0, height: float = 4.0) -> tuple[Any, Any]:
    """Return a figure that needs no display, and its axes; width of a column and height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns)
    for axis in [axes] if columns == 1 else axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def label_ends(axes: "Axes", ends: Mapping[str, tuple[float, float, str]], *, lines: bool = False) -> None:
    """Write the name of each line or point to the right of the axes, in its colour, without names on top of each other.

    Args:
      axes: with what is named, whose limits and scale are as they will be drawn.
      ends: {name: (x, y, colour)} of the line's end or the point.
      lines: draw a thin line from each to its name.
    """
    axes.get_ylim()  # a limit that is still to be chosen is chosen now
    top, bottom = (axes.transAxes.transform((0, y))[1] for y in (1, 0))
    heights = {name: axes.transData.transform((x, y))[1] for name, (x, y, _) in ends.items()}
    step = 9 * axes.figure.dpi / 72  # of 8-point text
    place = -math.inf
    for name in sorted(heights, key=lambda name: heights[name]):
        place = max(heights[name], place + step)
        heights[name] = place
    excess = max(0.0, place - top)
    for name, (x, y, colour) in ends.items():
        axes.annotate(
            name,
            (x, y),
            (1.01, (heights[name] - excess - bottom) / (top - bottom)),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=colour,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": colour, "alpha": 0.5} if lines else None,
        )

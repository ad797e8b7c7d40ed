# SPDX-License-Identifier: Apache-2.0
"""A picture of several runs' accuracy over epochs, as an SVG file; names stand at the ends of their lines."""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup, escape

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
"""Okabe and Ito's colours, which the colour-blind tell apart; yellow is left out, as it is faint on white."""
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 700, 420, 52, 190, 34, 44
_TEXT = 14  # pixels from one name to the next


def curves(accuracies: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Return an SVG: one line for each row's mean, in a band from its lowest to its highest seed.

    Args:
      accuracies: {row: for each seed, the accuracy of each epoch in 0..1}; each row has the same number of epochs in
        all seeds.
    """
    rows = {name: list(zip(*seeds, strict=True)) for name, seeds in accuracies.items()}
    every = [value for epochs in rows.values() for values in epochs for value in values]
    low, high = _limits(min(every), max(every))
    last = max(len(epochs) for epochs in rows.values())

    def x(epoch: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * ((epoch - 1) / (last - 1) if last > 1 else 0.5), 1)

    def y(value: float) -> float:
        return round(_TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (value - low) / (high - low)), 1)

    parts = [f'<text x="{_LEFT}" y="18">test accuracy</text>', *_percents(low, high, y), *_epochs(last, x)]
    ends = {}
    for (name, epochs), colour in zip(rows.items(), itertools.cycle(COLOURS), strict=False):
        means = [statistics.mean(values) for values in epochs]
        upper = [f"{x(epoch)},{y(max(values))}" for epoch, values in enumerate(epochs, 1)]
        lower = [f"{x(epoch)},{y(min(values))}" for epoch, values in enumerate(epochs, 1)]
        line = " ".join(f"{x(epoch)},{y(mean)}" for epoch, mean in enumerate(means, 1))
        parts.append(f'<polygon points="{" ".join(upper + lower[::-1])}" fill="{colour}" fill-opacity="0.15"/>')
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<circle cx="{x(len(means))}" cy="{y(means[-1])}" r="3.5" fill="{colour}"/>')
        ends[f"{name} {means[-1]:.1%}"] = (y(means[-1]), colour)
    for name, height in apart({name: height for name, (height, _) in ends.items()}, _HEIGHT - _BOTTOM).items():
        at = f'x="{_WIDTH - _RIGHT + 10}" y="{height + 4:.1f}"'
        parts.append(f'<text {at} fill="{ends[name][1]}">{escape(name)}</text>')
    label = "Test accuracy over epochs, means over seeds; at the end " + ", ".join(ends)
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    return Markup(  # all texts in it are escaped
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(label)}" {size} '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}'
        "</svg>\n"
    )


def apart(heights: Mapping[str, float], lowest: float) -> dict[str, float]:
    """Return heights of names, in pixels from above, that stand on no other name nor below `lowest`."""
    placed: dict[str, float] = {}
    limit = lowest
    for name in sorted(heights, key=lambda name: heights[name], reverse=True):
        placed[name] = min(heights[name], limit)
        limit = placed[name] - _TEXT
    return placed


def _limits(low: float, high: float) -> tuple[float, float]:
    """Return the ends of the axis: round shares around two, at least two percent apart."""
    low, high = math.floor(50 * low) / 50, math.ceil(50 * high) / 50
    return (low, high) if high > low else (low - 0.02, high + 0.02)


def _percents(low: float, high: float, y: Callable[[float], float]) -> list[str]:
    """Return the grid and its shares; `y` gives the height of a share."""
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1) if (high - low) / step <= 6)
    parts = []
    for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        height = y(number * step)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{height}" y2="{height}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{height + 4}" text-anchor="end">{number * step:.0%}</text>')
    return parts


def _epochs(last: int, x: Callable[[float], float]) -> list[str]:
    """Return the numbers of some epochs and the axis' name; `x` gives the place of an epoch."""
    step = max(1, math.ceil(last / 10))
    numbers = range(1, last + 1, step)
    parts = [
        f'<text x="{x(number)}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{number}</text>' for number in numbers
    ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    return [*parts, f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">epoch</text>']

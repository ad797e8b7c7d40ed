# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG: lines, bars, and a map of layers and epochs. Colours are CSS classes, so that pages set them.

Every chart is an image with a label that says its result in words; the numbers stand in a table beside it.
"""

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 340, 150, 40, 22, 8
LEVELS = 5  # shades of the map
NOT_QUANTIZED, QUANTIZED = "0", "q"


def lines(
    values: Sequence[float],
    *,
    label: str,
    axis: tuple[float, float],
    percent: bool,
    limit: float | None,
    of: int | None = None,
    planned: Sequence[float] = (),
) -> Markup:
    """Return a line chart of one value per epoch.

    Args:
      values: finite, one for each epoch so far; at least one, unless `of` is given.
      label: what the chart shows, in words.
      axis: its lower and its higher end.
      percent: show the axis in percent.
      limit: value at which a dashed line is drawn; None: none.
      of: number of epochs that the chart has room for; None: those that have a value.
      planned: values by plan after each of so many equal parts of the epochs, no more than epochs; a dashed curve.
    """
    width, height = _WIDTH - _LEFT - 8, _HEIGHT - _TOP - _BOTTOM
    low, high = axis
    last = max(len(values) if of is None else of, len(values), 1) - 1

    def y(value: float) -> float:
        return round(_TOP + height * (1 - (value - low) / (high - low)), 1)

    def x(index: float) -> float:
        return round(_LEFT + width * (index / last if last else 0.5), 1)

    parts = []
    for tick in _ticks(low, high):
        text = f"{tick:.0%}" if percent else f"{tick:g}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y(tick) + 3.5}" text-anchor="end">{text}</text>')
    if limit is not None and low <= limit <= high:
        parts.append(f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y(limit)}" y2="{y(limit)}"/>')
    if planned:
        ends = [(last + 1) * part / len(planned) - 1 for part in range(1, len(planned) + 1)]
        points = " ".join(f"{x(end)},{y(value)}" for end, value in zip(ends, planned, strict=True))
        parts.append(f'<polyline class="planned" points="{points}"/>')
    if values:
        points = " ".join(f"{x(i)},{y(value)}" for i, value in enumerate(values))
        parts.append(f'<polyline class="line" points="{points}"/>')
        parts.append(f'<circle class="dot" cx="{x(len(values) - 1)}" cy="{y(values[-1])}" r="3.2"/>')
    for index, anchor in {0: "start", last: "end"}.items():
        parts.append(f'<text class="tick" x="{x(index)}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{index + 1}</text>')
    return _svg(_WIDTH, _HEIGHT, label, parts)


def meter(share: float, *, label: str) -> Markup:
    """Return a horizontal bar that is filled to a share in 0..1."""
    width, height = 200, 6
    parts = [f'<rect class="track" width="{width}" height="{height}" rx="3"/>']
    if share > 0:
        parts.append(f'<rect class="bar" width="{max(height, width * min(share, 1)):.1f}" height="{height}" rx="3"/>')
    return _svg(width, height, label, parts)


def bars(rows: Sequence[tuple[str, float, float, str]], *, label: str) -> Markup:
    """Return horizontal bars of shares.

    Args:
      rows: (name, share in 0..1, share of pure chance in 0..1, text at the bar's end).
      label: what the chart shows, in words.
    """
    start, end, height = 88, 312, 31
    parts = []
    for number, (name, share, chance, text) in enumerate(rows):
        top, mark = number * height + 6, start + (end - start) * chance
        length = max(1.0, (end - start) * min(share, 1.0))
        parts.append(f'<text class="name" x="{start - 10}" y="{top + 14}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect class="track" x="{start}" y="{top}" width="{end - start}" height="18" rx="3"/>')
        parts.append(f'<rect class="bar" x="{start}" y="{top}" width="{length:.1f}" height="18" rx="3"/>')
        parts.append(f'<line class="chance" x1="{mark:.1f}" x2="{mark:.1f}" y1="{top - 3}" y2="{top + 21}"/>')
        parts.append(f'<text class="value" x="{end + 10}" y="{top + 14}">{escape(text)}</text>')
    return _svg(380, len(rows) * height + 6, label, parts)


def cells(names: Sequence[str], chosen: Sequence[frozenset[str]], levels: Sequence[dict[str, int]]) -> list[str]:
    """Return one text for each layer with a character for each epoch: 0, q, or a level of 1 to 5.

    Args:
      names: of the layers.
      chosen: for each epoch, the layers that ran quantized.
      levels: for each epoch, the level of each layer's impact; {} where none is known.
    """
    return [
        "".join(
            NOT_QUANTIZED if name not in ones else str(level[name]) if name in level else QUANTIZED
            for ones, level in zip(chosen, levels, strict=True)
        )
        for name in names
    ]


def layer_map(names: Sequence[str], rows: Sequence[str], *, label: str) -> Markup:
    """Return a map: a row for each layer, a column for each epoch, filled where the layer ran quantized.

    One path for each shade draws runs of equal cells, so that 120 layers and 100 epochs take some 70 kB.

    Args:
      names: of the layers.
      rows: as `cells` returns them, one for each name.
      label: what the map shows, in words.
    """
    epochs = max(1, len(rows[0]) if rows else 1)
    tall = 15 if len(rows) <= 24 else 7
    named = len(rows) <= 24
    left = min(150, 12 + 6 * max(map(len, names), default=0)) if named else 4
    wide = max(4, min(24, (700 - left) // epochs))
    paths: dict[str, list[str]] = {}
    for row, text in enumerate(rows):
        column = 0
        while column < len(text):
            shade, first = text[column], column
            while column < len(text) and text[column] == shade:
                column += 1
            if shade != NOT_QUANTIZED:
                paths.setdefault(shade, []).append(f"M{first} {row}h{column - first}")
    width, height = left + wide * epochs, tall * len(rows)
    parts = [f'<rect class="ground" x="{left}" y="0" width="{wide * epochs}" height="{height}"/>']
    move = f'transform="translate({left} {tall / 2:g}) scale({wide} {tall})"'
    for shade in sorted(paths):
        parts.append(f'<path class="shade-{shade}" {move} d="{"".join(paths[shade])}"/>')
    if named:
        for row, name in enumerate(names):
            short = name if len(name) <= 22 else f"{name[:21]}…"
            parts.append(
                f'<text class="tick" x="{left - 6}" y="{row * tall + tall / 2 + 3.5}" text-anchor="end">'
                f"{escape(short)}</text>"
            )
    data = f' id="map" data-left="{left}" data-wide="{wide}" data-tall="{tall}"'
    return _svg(width, max(height, 1), label, parts, data)


def matrix(names: Sequence[str], counts: Sequence[Sequence[int]], *, label: str) -> Markup:
    """Return a confusion matrix: a square for each pair of classes, darker for a larger share of its row.

    Args:
      names: of the classes.
      counts: [true class][predicted class].
      label: what the matrix shows, in words.
    """
    size, few = max(5, min(26, 520 // max(1, len(names)))), len(names) <= 24
    left = min(110, 12 + 6 * max(map(len, names), default=0)) if few else 4
    paths: dict[int, list[str]] = {}
    for row, line in enumerate(counts):
        for column, count in enumerate(line):
            if count:
                paths.setdefault(1 + min(LEVELS - 1, LEVELS * count // sum(line)), []).append(f"M{column} {row}h1")
    side = size * len(names)
    parts = [f'<rect class="ground" x="{left}" y="0" width="{side}" height="{side}"/>']
    move = f'transform="translate({left} {size / 2:g}) scale({size})"'
    for shade in sorted(paths):
        parts.append(f'<path class="shade-{shade}" {move} d="{"".join(paths[shade])}"/>')
    for row, name in enumerate(names if few else ()):
        short = name if len(name) <= 16 else f"{name[:15]}…"
        middle = row * size + size / 2 + 3.5
        parts.append(f'<text class="tick" x="{left - 6}" y="{middle}" text-anchor="end">{escape(short)}</text>')
    return _svg(left + side, max(side, 1), label, parts)


def levels_of(scores: Sequence[dict[str, float] | None]) -> list[dict[str, int]]:
    """Return, for each epoch, the level 1 to 5 of each layer's impact among all impacts of the run.

    An epoch without an analysis keeps the impacts of the one before.
    """
    everything = sorted(value for one in scores if one for value in one.values() if math.isfinite(value))
    found: list[dict[str, int]] = []
    for one in scores:
        if one is None:
            found.append(found[-1] if found else {})
            continue
        finite = {name: value for name, value in one.items() if math.isfinite(value)}
        found.append({name: _level(value, everything) for name, value in finite.items()})
    return found


def _level(value: float, everything: Sequence[float]) -> int:
    below = sum(1 for edge in range(1, LEVELS) if value > everything[edge * (len(everything) - 1) // LEVELS])
    return 1 + below


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two, three to six of them."""
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 10) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _svg(width: float, height: float, label: str, parts: Sequence[str], data: str = "") -> Markup:
    body = "".join(parts)
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    return Markup(  # all texts in it are escaped above
        f'<svg role="img" aria-label="{escape(label)}" {size}{data}>{body}</svg>'
    )

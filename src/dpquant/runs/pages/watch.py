# SPDX-License-Identifier: Apache-2.0
"""The page of `dpquant watch`, in parts that change one by one. A pure function of a run's state."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from dpquant.privacy.plan import rounded_up
from dpquant.runs.alerts import Alert, duration
from dpquant.runs.pages import charts
from dpquant.runs.pages.report import environment, read_source, rendered, score_chart
from dpquant.runs.status import RunStatus

PHASES = {
    "waiting": "waiting for the run to begin",
    "starting": "starting: it measures and checks before its next step",
    "running": "running",
    "silent": "silent",
    "stopped": "stopped",
    "diverged": "diverged",
    "finished": "finished",
}
"""{phase: in words}."""


def parts(status: RunStatus, alerts: Sequence[Alert]) -> dict[str, Markup]:
    """Return the parts of the page, {id: markup}; `title` is text for the window.

    Args:
      status: of the run.
      alerts: on it.
    """
    made: Any = environment().get_template("watch_parts.html.jinja").module  # its macros
    left = status.pace.seconds_left if status.pace is not None and status.phase == "running" else None
    grave = status.phase in ("silent", "stopped", "diverged")
    map_chart, levelled = _map(status)
    drawn = {
        "head": made.head(status, PHASES[status.phase], grave),
        "alerts": made.alerts(alerts),
        "advice": made.advice(alerts),
        "figures": made.figures(status, *_meters(status), None if left is None else duration(left)),
        "score": _score(status, made.chart),
        "epsilon": made.chart(_epsilon(status), "Epsilon over epochs; dashed: the plan"),
        "map": made.map(map_chart, levelled),
        "numbers": made.numbers(status, facts(status)),
    }
    return {"title": Markup.escape(title(status)), **{name: Markup(text.strip()) for name, text in drawn.items()}}


def page(found: Mapping[str, Markup], *, nonce: str) -> str:
    """Return the whole page as HTML.

    Args:
      found: its parts.
      nonce: of its style and script, as the answer's Content-Security-Policy names it.
    """
    return rendered(
        "watch.html.jinja",
        embedded={},
        sources=("style.css", "watch.js"),
        title=found["title"],
        parts=found,
        nonce=nonce,
        more_style=read_source("watch.css"),
    )


def title(status: RunStatus) -> str:
    """Return the title of the window: how far the run is comes first, for a narrow tab."""
    what = f"{status.model} on {status.dataset}" if status.model else status.name
    return f"{status.share:.0%} {what}" if status.phase == "running" else f"{status.phase}: {what}"


def facts(status: RunStatus) -> list[tuple[str, str]]:
    """Return facts about a run in words: what its ledger has charged, how fast it is, and what it plans."""
    rows = []
    if status.charged is not None:
        of = "" if status.steps is None else f" of {status.steps:,}"
        rows.append(("steps charged", f"{status.charged:,}{of}"))
    if status.plan is not None:
        plan = status.plan
        rows.append(("noise over sensitivity", f"{plan.noise_multiplier:.4g}"))
        rows.append(("expected batch", f"{plan.expected_batch_size:g}"))
    pace = status.pace
    if pace is not None and pace.seconds_a_step is not None:
        rows.append(("usual step, analyses included", f"{pace.seconds_a_step:.3g} s"))
    if pace is not None and status.phase != "starting":
        rows.append(("last sign of life", f"{duration(pace.silent)} ago"))
    return rows


def _meters(status: RunStatus) -> tuple[Markup, Markup]:
    return (
        charts.meter(status.share, label=f"{status.share:.0%} of the steps"),
        charts.meter(status.epsilon_share, label=f"{status.epsilon_share:.0%} of epsilon"),
    )


def _score(status: RunStatus, chart: Callable[..., str]) -> str:
    score = status.score
    return "" if score is None else chart(score_chart(score, of=status.epochs), f"{score.title} over epochs")


def _epsilon(status: RunStatus) -> Markup | None:
    spent = [one.epsilon for one in status.per_epoch if one.epsilon is not None and math.isfinite(one.epsilon)]
    curve = status.curve if all(map(math.isfinite, status.curve)) else ()
    if not (spent or curve) or len(spent) != len(status.per_epoch):
        return None
    now = f"{rounded_up(spent[-1], 2)} after {len(spent)}" if spent else "not spent yet"
    return charts.lines(
        spent,
        label=f"Epsilon over epochs, {now}",
        axis=(0.0, 1.1 * max(*spent, *curve, 1e-3)),
        percent=False,
        limit=None,
        of=status.epochs,
        planned=curve,
    )


def _map(status: RunStatus) -> tuple[Markup | None, bool]:
    """Return the map of layers and epochs so far, and whether it shows impacts."""
    chosen = [frozenset(one.layers_quantized or ()) for one in status.per_epoch]
    if not chosen or not status.layers:
        return None, False
    levels = charts.levels_of([one.scores for one in status.per_epoch])
    rows = charts.cells(status.layers, chosen, levels)
    label = f"{len(status.layers)} layers over {len(chosen)} epochs so far"
    return charts.layer_map(status.layers, rows, label=label), any(levels)

# SPDX-License-Identifier: Apache-2.0
"""The report of one run: one HTML file that loads nothing. A pure function of facts; see `facts.py`."""

import functools
import json
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from dpquant.privacy.meaning import percent_up
from dpquant.privacy.plan import rounded_up
from dpquant.runs.alerts import Alert, alerts
from dpquant.runs.declared import QUESTIONS
from dpquant.runs.evaluated import UNPROTECTED
from dpquant.runs.pages import charts
from dpquant.runs.pages.answers import ASSUMPTIONS, NOT_DECLARED, NOT_RECORDED, RELEASED, answers
from dpquant.runs.pages.facts import Facts
from dpquant.runs.record import RunRecord
from dpquant.runs.score import Score, score_of
from dpquant.runs.status import DEFAULT_EMA, RunStatus
from dpquant.version import version

_TEMPLATES = Path(__file__).parent / "templates"
REDACTED = "redacted"  # in what a page holds for programs: command, folders and declared words were left out


def report(facts: Facts) -> str:
    """Return the report of a run as HTML.

    Privacy: post-processing of what the run has released.
    """
    record = facts.record
    asked = answers(facts)
    numbers: dict[str, list[int]] = {}
    for number, one in enumerate(asked, 1):
        numbers.setdefault(one.section, []).append(number)
    said = record.declared or {}

    def declared(name: str) -> str:
        return "left out" if facts.redacted else said.get(name, NOT_DECLARED)

    return rendered(
        "report.html.jinja",
        title=f"Privacy report: {record.model} on {record.dataset}",
        embedded={
            "record_sha256": facts.record_sha256,
            "epsilon": _number(record.epsilon),
            "delta": record.delta,
            **({REDACTED: True} if facts.redacted else {}),
        },
        f=facts,
        r=record,
        score=score_of(record),
        unprotected=UNPROTECTED,
        answers=asked,
        numbers=numbers,
        declared=declared,
        questions=QUESTIONS,
        missing=NOT_RECORDED,
        assumptions=ASSUMPTIONS,
        released=RELEASED,
        noticed=_noticed(facts),
        **_charts(facts),
    )


def _noticed(facts: Facts) -> list[Alert]:
    """Return what `dpquant watch` would say of the run that has ended, less what stands on top as an alarm."""
    classes = None if facts.description is None else facts.description.num_classes
    status = RunStatus.of(facts.record, name=facts.name, classes=classes, ema=_ema(facts.settings))
    return [one for one in alerts(status) if not one.grave]


def _ema(settings: str | None) -> float:
    """Return the weight of the newest analysis, which the record does not hold; the default where it is not known."""
    try:
        found = tomllib.loads(settings or "").get("ema", DEFAULT_EMA)
    except tomllib.TOMLDecodeError:
        return DEFAULT_EMA
    return found if isinstance(found, float) and 0 < found <= 1 else DEFAULT_EMA


def rendered(
    template: str, *, embedded: Mapping[str, Any], sources: tuple[str, str] = ("style.css", "page.js"), **values: Any
) -> str:
    """Return a page from its template.

    Args:
      template: its name.
      embedded: put into the page for programs.
      sources: names of its style and its script.
      values: for the template.
    """
    style, script = map(read_source, sources)
    return (
        environment()
        .get_template(template)
        .render(
            version=version(),
            style=style,
            script=script,
            embedded=_json(embedded),
            **values,
        )
    )


def read_source(name: str) -> Markup:
    """Return a style sheet or a script of ours, to be put into a page as it is."""
    return Markup((_TEMPLATES / name).read_text(encoding="utf-8"))


def score_chart(score: Score, *, of: int | None = None) -> Markup:
    """Return the chart of a run's score over its epochs, or over those so far `of` planned ones."""
    values = list(score.values.values())
    low = math.floor(10 * max(0.0, min(values) - 0.02)) / 10
    axis = (low, 1.0) if score.is_share else (0.0, 1.1 * max([*values, 1e-9]))
    first, last = (score.text(value) for value in (values[0], values[-1]))
    label = f"{score.title} over {len(values)} epochs, from {first} to {last}"
    return charts.lines(values, label=label, axis=axis, percent=score.is_share, limit=None, of=of)


def _charts(facts: Facts) -> dict[str, Any]:
    record = facts.record
    drawn: dict[str, Any] = {"score_chart": score_chart(score_of(record)), "epsilon_chart": None, "attack_chart": None}
    spent = [one.epsilon for one in record.per_epoch if one.epsilon is not None and math.isfinite(one.epsilon)]
    if spent and len(spent) == len(record.per_epoch):
        limit = None if record.plan is None else record.plan.epsilon
        drawn["epsilon_chart"] = charts.lines(
            spent,
            label=f"Epsilon over {len(spent)} epochs, ends at {rounded_up(spent[-1], 2)}",
            axis=(0.0, 1.1 * max(spent[-1], limit or 0.0, 1e-3)),
            percent=False,
            limit=limit,
        )
    if facts.meaning is not None:
        found = [(one.false_positive_rate, one.true_positive_rate) for one in facts.meaning.attacks]
        told = "; ".join(f"at {100 * rate:g} % false accusations at most {percent_up(hit)}" for rate, hit in found)
        rows = [(f"{100 * rate:g} % falsely", hit, rate, percent_up(hit)) for rate, hit in found]
        drawn["attack_chart"] = charts.bars(rows, label=f"Members found out: {told}")
    return {**drawn, **_map(record), "confusion_chart": _confusion(facts)}


def _confusion(facts: Facts) -> Markup | None:
    """Return the picture of a confusion matrix, if there is one."""
    found = facts.evaluation
    if found is None or found.classes is None or found.confusion is None:
        return None
    right = sum(row[place] for place, row in enumerate(found.confusion))
    label = f"Confusion matrix of {len(found.classes)} classes, {right:,} on the diagonal. The table has the numbers."
    return charts.matrix([one.name for one in found.classes], found.confusion, label=label)


def _map(record: RunRecord) -> dict[str, Any]:
    """Return the map of layers and epochs, if the record has them."""
    chosen = [frozenset(one.layers_quantized) for one in record.per_epoch if one.layers_quantized is not None]
    if not record.layers or len(chosen) != len(record.per_epoch):
        return {"map_chart": None, "map_data": None, "levelled": False}
    names = [layer.name for layer in record.layers]
    levels = charts.levels_of([one.scores for one in record.per_epoch])
    rows = charts.cells(names, chosen, levels)
    label = (
        f"{len(names)} layers over {len(chosen)} epochs; {record.quantized_fraction_layers:.0%} of the cells are "
        "quantized. The table below has the numbers."
    )
    return {
        "map_chart": charts.layer_map(names, rows, label=label),
        "map_data": _json({"names": names, "rows": rows}),
        "levelled": any(levels),
    }


def _json(value: Any) -> Markup:
    """Return JSON that can stand in a script element, whatever its texts hold."""
    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


@functools.cache
def environment() -> jinja2.Environment:
    """Return what templates are read with: every text in them is escaped, and a missing value is an error."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"eps": rounded_up, "pct": _percent, "up": percent_up, "delta": lambda x: f"{x:g}"}
    found.filters["options"] = _unbroken_options
    return found


def _unbroken_options(text: str) -> Markup:
    """Return a text in which an option, as --lr-schedule, is not broken over two lines."""
    return Markup(re.sub(r"(--[a-z][a-z-]*)", r'<span class="nowrap">\1</span>', str(Markup.escape(text))))


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"

# SPDX-License-Identifier: Apache-2.0
"""The state of a run in a terminal: what `dpquant watch --terminal` and `--once` show. Loads no torch."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dpquant.privacy.plan import rounded_up
from dpquant.runs.alerts import Alert, alerts, duration
from dpquant.runs.following import Following
from dpquant.runs.pages.watch import PHASES
from dpquant.runs.status import OVER, RunStatus

_LEVELS, _ASCII_LEVELS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
_WIDEST = 40  # epochs that a sparkline shows
_POLL = 1.0  # seconds between two looks at the directory


def view(status: RunStatus, found: Sequence[Alert], *, ascii_only: bool = False) -> RenderableType:
    """Return the state of a run: two bars, a sparkline of accuracy, its pace, and alerts.

    Args:
      status: of the run.
      found: its alerts.
      ascii_only: draw with characters that every terminal has.
    """
    grave = status.phase in ("silent", "stopped", "diverged")
    head = Text(f"{status.model} on {status.dataset}" if status.model else status.name, style="bold")
    head.append(f"  {PHASES[status.phase]}", style="bold red" if grave else "green")
    if status.policy:
        head.append(f"  {status.policy}, {status.format}" if status.policy != "none" else "  full precision", "dim")
    rows: list[RenderableType] = [head]
    if status.plan is not None:
        rows.append(_bars(status, ascii_only))
    if moves := pace(status):
        rows.append(Text(moves, style="dim"))
    if found:
        told = Table.grid(padding=(0, 2))
        for one in found:
            told.add_row(_label(one), Text(one.text))
        rows += [Text(), told]
    return Group(*rows)


def _label(alert: Alert) -> Text:
    if alert.grave:
        return Text("ALERT", style="bold red")
    return Text("advice", style="cyan") if alert.is_advice else Text("alert", style="yellow")


def _bars(status: RunStatus, ascii_only: bool) -> Table:
    table = Table.grid(padding=(0, 2))
    rows = (
        ("steps", status.share, f"{status.step:,} of {status.steps:,}"),
        ("epsilon", status.epsilon_share, _spent(status)),
    )
    for name, share, text in rows:
        bar = ProgressBar(total=1.0, completed=share, width=_WIDEST, complete_style="cyan", finished_style="green")
        table.add_row(name, bar, text)
    if (score := status.score) is not None:
        drawn = Text(sparkline(list(score.values.values()), ascii_only=ascii_only), style="green")
        table.add_row(score.name, drawn, f"{score.line(score.last)}, best {score.line(score.best)}")
    return table


def _spent(status: RunStatus) -> str:
    planned = "" if status.plan is None else f" of {rounded_up(status.plan.epsilon, 2)}"
    return f"{rounded_up(status.epsilon, 2)}{planned}"


def sparkline(values: Sequence[float], *, ascii_only: bool = False) -> str:
    """Return the last values as a line of small bars, from the least of all values to the largest."""
    levels = _ASCII_LEVELS if ascii_only else _LEVELS
    low, high = min(values), max(values)
    width = high - low or 1.0
    return "".join(levels[round((value - low) / width * (len(levels) - 1))] for value in values[-_WIDEST:])


def pace(status: RunStatus) -> str:
    """Return in words how fast a run is, which is its operator's; "" if it is not known."""
    known = status.pace
    if known is None:
        return ""
    told = []
    if known.seconds_left is not None and status.phase == "running":
        told.append(f"{duration(known.seconds_left)} left")
    if known.examples_per_second is not None:
        told.append(f"{known.examples_per_second:,.0f} examples/s")
    if status.phase != "starting":
        told.append(f"last sign of life {duration(known.silent)} ago")
    return ", ".join(told)


def line(status: RunStatus) -> str:
    """Return the state of a run in one line."""
    if status.plan is None:
        return f"{status.name}: {PHASES[status.phase]}"
    epochs = f"epoch {len(status.per_epoch)} of {status.epochs}, step {status.step} of {status.steps}"
    score = status.score
    told = "" if score is None else f", {score.name} {score.line(score.last)}"
    return f"{status.name}: {status.phase}, {epochs}, epsilon {_spent(status)}{told}"


def follow(
    following: Following, console: Console, *, poll: float = _POLL, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Show a run until it is over: in place on a terminal, else by a line for each epoch, phase and alert.

    Args:
      following: the run.
      console: to show it on.
      poll: seconds between two looks at the directory.
      sleep: waits so many seconds.
    Raises:
      SettingError: something else lies in the run's place.
    """
    states = _until_over(following, poll, sleep)
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for status in states:
                live.update(view(status, alerts(status), ascii_only=console.options.ascii_only), refresh=True)
        return
    said: set[object] = set()
    for status in states:
        news = {(status.phase, len(status.per_epoch)): line(status)}
        news |= {(one.kind, status.phase): f"alert: {one.text}" for one in alerts(status)}
        for key in [key for key in news if key not in said]:
            print(news[key], flush=True)
            said.add(key)


def _until_over(following: Following, poll: float, sleep: Callable[[float], None]) -> Iterator[RunStatus]:
    while True:
        status = following.status()
        yield status
        if status.phase in OVER:
            return
        sleep(poll)


def to_json(status: RunStatus, found: Sequence[Alert]) -> str:
    """Return the state of a run as JSON, for programs. A number that is not finite is null."""
    known, last = status.pace, status.per_epoch[-1] if status.per_epoch else None
    facts = {
        "name": status.name,
        "phase": status.phase,
        "model": status.model,
        "dataset": status.dataset,
        "policy": status.policy,
        "format": status.format,
        "step": status.step,
        "steps": status.steps,
        "epoch": len(status.per_epoch),
        "epochs": status.epochs,
        "charged": status.charged,
        "epsilon": _finite(status.epsilon),
        "epsilon_planned": None if status.plan is None else _finite(status.plan.epsilon),
        "delta": None if status.plan is None else status.plan.delta,
        "accuracy_test": None if last is None else last.accuracy_test,
        "metrics_test": None if last is None else {name: _finite(x) for name, x in (last.metrics_test or {}).items()},
        "silent": None if known is None else known.silent,
        "examples_per_second": None if known is None else known.examples_per_second,
        "seconds_left": None if known is None else known.seconds_left,
        "alerts": [{**dataclasses.asdict(one), "advice": one.is_advice} for one in found],
    }
    return json.dumps(facts, indent=2) + "\n"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

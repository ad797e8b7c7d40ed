# SPDX-License-Identifier: Apache-2.0
"""What deserves attention in a run. A pure function of its state, shared by terminal, page and report."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

from dpquant.privacy.meaning import too_large
from dpquant.privacy.plan import rounded_up
from dpquant.runs.status import RunStatus
from dpquant.training.cost import noisy_ranking

Kind = Literal[
    "diverged", "stopped", "silent", "unreadable", "unsafe_metrics", "delta", "budget",
    "chance", "fell", "ranking", "slow",
]  # fmt: skip

UNSAFE = "Training accuracy was measured on private records and written down. Epsilon does not cover it."
_SPENT = 0.9  # of epsilon
_LEASED = 0.01  # of the steps, which the ledger may charge ahead
_EARLY = 0.2  # of the steps: until then a model may still be guessing
_NEAR_CHANCE = 1.1  # times the accuracy of a guess
_FALL = 0.05  # of accuracy or average precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alert:
    """Something that deserves attention.

    Attributes:
      kind: one word for programs.
      text: for people: what was found, what it means, what to do.
      grave: the run has failed, or its guarantee is weaker than it looks. Others concern accuracy and speed.
    """

    kind: Kind
    text: str
    grave: bool = False

    @property
    def is_advice(self) -> bool:
        """Whether it is about the settings alone: the run goes as well as it can with them."""
        return self.kind in ("ranking", "slow")


def alerts(status: RunStatus) -> list[Alert]:
    """Return what deserves attention in a run, the gravest first."""
    found = [alert for check in _CHECKS if (alert := check(status)) is not None]
    return sorted(found, key=lambda one: not one.grave)


def _failed(status: RunStatus) -> Alert | None:
    charged = "nothing is charged"
    if status.charged:
        of = "" if status.steps is None else f" of {status.steps}"
        charged = f"charged {status.charged}{of} steps, epsilon {rounded_up(status.epsilon, 2)}"
    match status.phase:
        case "diverged":
            return Alert(kind="diverged", text=status.trouble or f"The run has diverged: {charged}.", grave=True)
        case "stopped":
            text = f"The run has stopped without a record: {charged}. It is continued by: dpquant resume {status.name}"
            return Alert(kind="stopped", text=text, grave=True)
        case "silent" if status.pace is not None:
            text = (
                f"No sign of life for {duration(status.pace.silent)}, far longer than its steps take: {charged}. It "
                f"hangs, or was killed. If it was killed: dpquant resume {status.name}"
            )
            return Alert(kind="silent", text=text, grave=True)
    return None


def _unreadable(status: RunStatus) -> Alert | None:
    if not status.trouble or status.phase == "diverged":
        return None
    return Alert(kind="unreadable", text=status.trouble, grave=True)


def _unsafe(status: RunStatus) -> Alert | None:
    return Alert(kind="unsafe_metrics", text=UNSAFE, grave=True) if status.unsafe_metrics else None


def _delta(status: RunStatus) -> Alert | None:
    text = "" if status.plan is None else too_large(status.plan.delta, status.records)
    return Alert(kind="delta", text=text[0].upper() + text[1:], grave=True) if text else None


def _budget(status: RunStatus) -> Alert | None:
    """Return an alert where steps were charged and lost, so that the budget ends before the epochs do.

    By plan nine tenths of epsilon are spent before the last epoch, which is no alert.
    """
    if status.steps is None or status.charged is None or status.phase in ("finished", "diverged"):
        return None
    lost = status.charged - status.step
    if status.epsilon_share < _SPENT or lost <= max(1, math.ceil(_LEASED * status.steps)):
        return None
    return Alert(
        kind="budget",
        text=(
            f"{status.epsilon_share:.0%} of epsilon are spent with {status.steps - status.step} of {status.steps} "
            f"steps left: {lost} were charged and lost. The run will end early."
        ),
    )


def _chance(status: RunStatus) -> Alert | None:
    score = status.score
    if status.classes is None or status.classes < 2 or score is None or status.share < _EARLY:
        return None
    last = score.last
    if last > _NEAR_CHANCE / status.classes:
        return None
    return Alert(
        kind="chance",
        text=(
            f"Accuracy is at chance: {last:.1%} of {status.classes} classes after {status.share:.0%} of the steps. "
            "Training has diverged, or noise hides what it learns. Give a lower lr, or more epsilon, epochs or records."
        ),
    )


def _fell(status: RunStatus) -> Alert | None:
    score = status.score
    if score is None or score.is_error or score.best - score.last <= _FALL:
        return None
    return Alert(
        kind="fell",
        text=(
            f"{score.title} fell by {100 * (score.best - score.last):.1f} points, from {score.line(score.best)} in "
            f"epoch {score.best_epoch + 1} to {score.line(score.last)}. A lower lr or --average steadies it."
        ),
    )


def _ranking(status: RunStatus) -> Alert | None:
    noise = status.score_noise
    text = "" if noise is None else noisy_ranking(list(status.scores.values()), noise)
    return Alert(kind="ranking", text=text) if text else None


def _slow(status: RunStatus) -> Alert | None:
    slow = [name for name in status.ever_quantized if status.gains.get(name, math.inf) <= 1]
    if not slow:
        return None
    listed = ", ".join(f"{name} ({status.gains[name]:.2g} times as fast)" for name in slow[:5])
    more = f" and {len(slow) - 5} more" if len(slow) > 5 else ""
    return Alert(
        kind="slow",
        text=(
            f"No speed-up where these layers run quantized on this machine: {listed}{more}. They cost accuracy and "
            "gain nothing. dpquant assess measures what quantizing gains here."
        ),
    )


_CHECKS: tuple[Callable[[RunStatus], Alert | None], ...] = (
    *(_failed, _unreadable, _unsafe, _delta, _budget),
    *(_chance, _fell, _ranking, _slow),
)


def duration(seconds: float) -> str:
    """Return a time in words, in its two largest units: "3 h 12 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    if hours == 0:
        return f"{minutes} min" if minutes >= 10 else f"{minutes} min {whole % 60} s"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min"

# SPDX-License-Identifier: Apache-2.0
"""The privacy statement of a run: what is guaranteed after its releases and what is not, in words.

This file loads no torch.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpquant.privacy import accounting
from dpquant.privacy.events import NEIGHBOURS, PUBLIC, Event
from dpquant.privacy.grid_noise import covered
from dpquant.privacy.meaning import meaning_of

if TYPE_CHECKING:
    from dpquant.privacy.plan import PrivacyPlan

PROTECTED = (
    "Protected is each record, against whoever has the model, every intermediate state of it and everything else that "
    "the run released, and knows all other records."
)
TRUSTED = "their machines and the network between them are trusted"
_CHANNELS = {"gaussian": "floating-point side channels (the proof is about real numbers); ", "discrete": ""}


def statement_of(
    plan: "PrivacyPlan",
    events: Sequence[Event],
    *,
    secure: bool,
    num_values: int | None,
    processes: int,
    apart: bool,
) -> str:
    """Return the privacy statement after these releases.

    Args:
      plan: of the run.
      events: the releases.
      secure: False if sampling or noise came from a given seed.
      num_values: trainable numbers of the model, if they are known.
      processes: that the run has had, at most.
      apart: each process had records of its own.
    Privacy: post-processing.
    """
    spent, check = (accounting.epsilon(events, plan.delta, accountant) for accountant in ("pld", "rdp"))
    released = "; ".join(_described(plan, event) for event in events) or "nothing was released"
    lines = [
        f"Differential privacy with epsilon = {rounded_up(spent)} and delta = {plan.delta:g}, for the model and "
        "everything else that the run released (layer scores, schedule, this statement).",
        PROTECTED,
        NEIGHBOURS,
        *_person_told(plan, events),
        *([] if (meaning := meaning_of(events, plan.delta)) is None else [meaning.told]),
        f"Mechanism: Poisson-subsampled Gaussian: {released}.",
        *([covered(num_values, sum(event.count for event in events))] if plan.noise == "discrete" else []),
        f"Accountant: {accounting.version()}, privacy loss distributions on a grid of {accounting.GRID:g}, rounded "
        f"to the pessimistic side; Renyi accounting, as a check: epsilon = {rounded_up(check)}.",
        PUBLIC,
        "Public randomness (`seed`) only initialises the model and schedules its layers. Sampling, noise, "
        "rounding, dropout and random augmentation follow from a secret key of the run, which the operating system "
        "gives; noise is AES-128 in counter mode.",
        *_processes_told(processes, apart=apart),
        "Not covered: hyper-parameter tuning and other runs on the same data; pre-processing that was fitted to "
        f"the data; {_persons_not_covered(plan)}; what is measured on a test set; {_CHANNELS[plan.noise]}timing "
        "and memory.",
    ]
    if not secure:
        lines.insert(
            0,
            "NOT PRIVATE: sampling or noise came from a given seed, for research. Whoever knows the seed can undo "
            "the noise. With secret randomness the following would hold.",
        )
    return "\n".join(lines)


def _processes_told(processes: int, *, apart: bool) -> list[str]:
    if processes == 1:
        return []
    records = " Each process read records of its own; a record of which two of them had a copy counts as two."
    return [
        f"The run had {processes} processes: {TRUSTED}. The secret key, and sums of clipped gradients without noise, "
        f"were sent over that network, which the run itself does not encrypt.{records if apart else ''}"
    ]


def _person_told(plan: "PrivacyPlan", events: Sequence[Event]) -> list[str]:
    person = plan.epsilon_per_person(events)
    if person is None:
        return []
    return [
        f"Of a person with up to {plan.records_per_person} records, all of them added or removed: epsilon = "
        f"{rounded_up(person, 2)} at the same delta. That a person has no more is taken as given."
    ]


def _persons_not_covered(plan: "PrivacyPlan") -> str:
    if plan.records_per_person is None:
        return "several records of one person"
    return f"a person with more than {plan.records_per_person} records"


def _described(plan: "PrivacyPlan", event: Event) -> str:
    """Return an event in words."""
    if event.kind == "train":
        what = f"{event.count} training steps, gradients clipped to {plan.max_grad_norm:g}"
    else:
        norm = "" if plan.analysis is None else f", impacts clipped to {plan.analysis.max_norm:g}"
        what = f"{event.count} analyses{norm}"
    return f"{what}, noise multiplier {event.noise_multiplier:.4f}, sample rate {event.sample_rate:.6g}"


def rounded_up(epsilon: float, digits: int = 4) -> str:
    """Return an epsilon with `digits` decimals, rounded up, because an upper bound must remain one."""
    unit = 10**digits
    return f"{math.ceil(epsilon * unit) / unit:.{digits}f}" if math.isfinite(epsilon) else "infinity"

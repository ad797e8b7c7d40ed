# SPDX-License-Identifier: Apache-2.0
"""Events: releases of a Poisson-subsampled Gaussian mechanism, and the budget of a run.

The plan lists events in advance, the ledger records them, and the accountant composes them. Neighbouring data sets
differ by one record, added or removed.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

from dpquant.errors import SettingError

Kind = Literal["train", "analysis"]

NEIGHBOURS = "Neighbouring data sets differ by one record, added or removed; the unit of protection is one record."
PUBLIC = (
    "Taken as public: the settings of the plan; the numbers given as records and expected batch size, which need not "
    "be the true ones; the shapes and types of a record; the list of classes. The true number of records is not public."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """A number of equal releases of one mechanism: Poisson sampling, clipped sum, Gaussian noise.

    Attributes:
      kind: `train` for noised gradients, `analysis` for noised impacts.
      sample_rate: probability with which each record takes part in a release, in (0, 1].
      noise_multiplier: standard deviation of the noise over the sum's L2 sensitivity, >= 0.
      count: number of releases, >= 0.
      research: True if the randomness came from a given seed; then the release is not private, whatever its noise.
    Raises:
      SettingError: a value out of range.
    """

    kind: Kind
    sample_rate: float
    noise_multiplier: float
    count: int = 1
    research: bool = False

    def __post_init__(self) -> None:
        rules = {
            "kind": (self.kind in ("train", "analysis"), "to be train or analysis"),
            "sample_rate": (0 < self.sample_rate <= 1, "in (0, 1]"),
            "noise_multiplier": (0 <= self.noise_multiplier < math.inf, ">= 0 and finite"),
            "count": (isinstance(self.count, int) and self.count >= 0, "to be an int >= 0"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise SettingError(
                    f"Expected {name} {rule}; got {name}={getattr(self, name)!r}. "
                    "An event describes what was released. Take it from the plan or the ledger."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What a run may release at most, and the guarantee that it amounts to. Made by `PrivacyPlan.budget`.

    Attributes:
      epsilon: target of the plan; may be infinite.
      delta: of the (epsilon, delta) guarantee.
      events: planned releases, at most one event of each kind.
    """

    epsilon: float
    delta: float
    events: tuple[Event, ...]

    def planned(self, kind: Kind) -> Event | None:
        """Return the planned releases of a kind; None if there are none."""
        return next((event for event in self.events if event.kind == kind), None)


def merged(events: Iterable[Event]) -> list[Event]:
    """Return the events with equal releases counted together, in the order of their first event."""
    counts: dict[Event, int] = {}
    for event in events:
        release = dataclasses.replace(event, count=1)
        counts[release] = counts.get(release, 0) + event.count
    return [dataclasses.replace(release, count=count) for release, count in counts.items()]

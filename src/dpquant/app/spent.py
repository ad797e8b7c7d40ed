# SPDX-License-Identifier: Apache-2.0
"""`dpquant ledger`: verifies the ledgers of runs and composes what they charged. This module loads no torch.

Runs on the same data are composed: their events are one list, of which epsilon is computed. Tuning of hyper-parameters
is such a number of runs. Nothing but the ledgers enters, so that a run that crashed is accounted for as any other.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from dpquant.errors import SettingError
from dpquant.privacy import accounting
from dpquant.privacy.entries import Contents
from dpquant.privacy.events import Event, merged
from dpquant.privacy.ledger import Ledger
from dpquant.runs.names import LEDGER


def charged_by(ledgers: Iterable[Path]) -> list[Event]:
    """Return everything that runs on the same data have charged together, equal releases counted together.

    Args:
      ledgers: paths of their ledger files.
    Raises:
      LedgerError: a ledger is missing, unreadable or inconsistent.
    Privacy: post-processing.
    """
    return merged(event for ledger in ledgers for event in Ledger.read(ledger))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spent:
    """Budget that runs have spent, one run or several together.

    Attributes:
      events: what was charged, equal releases counted together.
      delta: at which epsilon is stated.
      epsilon: of all events.
      attempts: number of processes that charged.
      research: a part of the randomness came from a seed, so that epsilon is no guarantee.
    """

    events: Sequence[Event]
    delta: float
    epsilon: float
    attempts: int
    research: bool

    @classmethod
    def of(cls, contents: Sequence[Contents], delta: float) -> Self:
        """Return what ledgers say together."""
        events = merged(event for one in contents for event in one.events)
        return cls(
            events=events,
            delta=delta,
            epsilon=accounting.epsilon(events, delta),
            attempts=sum(one.attempts for one in contents),
            research=any(one.research for one in contents),
        )

    def count(self, kind: str) -> int:
        """Return the number of releases of a kind."""
        return sum(event.count for event in self.events if event.kind == kind)

    def facts(self) -> dict[str, Any]:
        """Return the facts for JSON. An epsilon that is not finite is null."""
        return {
            "epsilon": self.epsilon if math.isfinite(self.epsilon) else None,
            "delta": self.delta,
            "steps": self.count("train"),
            "analyses": self.count("analysis"),
            "attempts": self.attempts,
            "research": self.research,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
    """Result of `dpquant ledger`.

    Attributes:
      ledgers: {path of a ledger: what it says}, all of them verified.
      runs: {path of a ledger: what its run has spent}.
      together: what all runs have spent, if they used the same data.
    """

    ledgers: dict[Path, Contents]
    runs: dict[Path, Spent]
    together: Spent

    def to_json(self) -> str:
        """Return the account as JSON. Its head is that of a single ledger, null for several."""
        heads = [contents.head for contents in self.ledgers.values()]
        runs = [
            {
                "ledger": str(path),
                **self.runs[path].facts(),
                "planned_epsilon": _planned(contents),
                "head": contents.head,
                "format": contents.format,
                "run": contents.run,
                "dpquant": contents.version,
                "torn_bytes": contents.torn,
                "events": [dataclasses.asdict(event) for event in contents.events],
            }
            for path, contents in self.ledgers.items()
        ]
        facts = {**self.together.facts(), "head": heads[0] if len(heads) == 1 else None, "runs": runs}
        return json.dumps(facts, indent=2) + "\n"


def account(runs: Sequence[Path], delta: float | None = None) -> Account:
    """Verify the ledgers of runs and return what they have spent, each and together.

    Args:
      runs: run directories or ledger files, at least one.
      delta: at which epsilon is stated; None takes that of the plans.
    Raises:
      LedgerError: a ledger is not as it was written.
      SettingError: a path is missing or given twice, or no one delta is known.
    Privacy: post-processing.
    """
    ledgers: dict[Path, Contents] = {}
    for run in runs:
        path = run / LEDGER if run.is_dir() else run
        if not path.is_file():
            raise SettingError(f"Expected a run directory or a ledger file; got {run}. Check the path.")
        if any(path.samefile(other) for other in ledgers):
            raise SettingError(f"Expected every run once; got {run} twice. It would be counted twice. Leave one out.")
        ledgers[path] = Ledger.verify(path)
    deltas = {None if contents.budget is None else contents.budget.delta for contents in ledgers.values()}
    if delta is None and (len(deltas) != 1 or None in deltas):
        found = ", ".join("none" if one is None else f"{one:g}" for one in deltas)
        raise SettingError(
            f"Expected plans of one delta in the ledgers; got {found}. Epsilon is stated at a delta. Give --delta."
        )
    delta = next(iter(deltas)) if delta is None else delta
    assert delta is not None
    return Account(
        ledgers=ledgers,
        runs={path: Spent.of([contents], delta) for path, contents in ledgers.items()},
        together=Spent.of(list(ledgers.values()), delta),
    )


def _planned(contents: Contents) -> float | None:
    budget = contents.budget
    return budget.epsilon if budget is not None and math.isfinite(budget.epsilon) else None
